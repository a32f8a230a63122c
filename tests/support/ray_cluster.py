"""A Ray cluster of several small nodes on this machine; all its processes are stopped afterwards."""

import contextlib
import http.client
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

from scail2_rt.runtime.cluster.ledger import newest_state
from scail2_rt.runtime.cluster.objects import Objects
from tests.support.command import SCAIL2_RT, command_environment, unmeasured
from tests.support.served import Answer, Served, wait_for

HOST = "127.0.0.2"  # a loopback address that Ray does not replace by that of a network card
STORE_BYTES = 80 << 20  # of each node's object store: nothing large goes through it
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_enable_infeasible_task_early_exit": "0",
    "OMP_NUM_THREADS": "1",
}
SOON = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000, "health_check_failure_threshold": 5}


@contextlib.contextmanager
def nodes(count: int, environment: Mapping[str, str], head_cpus: int = 0) -> Iterator[Cluster]:
    """A cluster with a head node and `count` nodes of one CPU. environment: of every process of the cluster."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update({**unmeasured(environment), **QUIET})
    head = {
        "num_cpus": head_cpus,
        "object_store_memory": STORE_BYTES,
        "node_ip_address": HOST,
        "include_dashboard": False,
    }
    try:
        cluster = Cluster(initialize_head=True, head_node_args={**head, "_system_config": SOON})
        try:
            for _ in range(count):
                add_node(cluster)
            yield cluster
        finally:
            cluster.shutdown()
    finally:
        os.environ.clear()
        os.environ.update(before)


def add_node(cluster: Cluster) -> Any:
    return cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES, node_ip_address=HOST)


def processes(title: str) -> list[int]:
    """Ids of the processes that Ray gave this title."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().decode(errors="replace").startswith(title):
                found.append(int(path.parent.name))
    return found


REPLICA, FRONT_END, LEDGER = "ray::ServeReplica:scail2-rt-", "ray::ServeReplica:scail2-rt:FrontEnd", "ray::Ledger"


def working_on(video_id: str) -> int | None:
    """The replica process that has a job."""
    for folder in Path(tempfile.gettempdir()).glob(f"scail2-rt-replica-*-*/{video_id}"):
        pid = int(folder.parent.name.split("-")[3])
        if Path(f"/proc/{pid}").exists():
            return pid
    return None


def node_of(cluster: Cluster, pid: int) -> Any:
    """The node whose raylet started this process."""
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return next(node for node in cluster.worker_nodes if node.all_processes["raylet"][0].process.pid == parent)


class Deployed(Served):
    """The service of a cluster, by the installed command."""

    def __init__(self, data: str, cache: Path, address: str) -> None:
        self.store, self.key, self.process = data, None, None
        self._environment, self._address = command_environment(cache), address
        self.url, self._port = "", 0

    def deploy(self, engines: Path, *options: str) -> "Deployed":
        words = ["serve", str(engines), "--ray", self._address, "--data", self.store, "--port", str(self._port)]
        result = subprocess.run(
            [str(SCAIL2_RT), *words, "--no-warm", *options],
            capture_output=True,
            text=True,
            env=self._environment,
            timeout=180,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        self.url = result.stdout.strip()
        self._port = int(self.url.rpartition(":")[2])
        return self

    @property
    def log(self) -> str:
        return ""

    def ask(self, method: str, path: str, body: bytes | Mapping[str, Any] | None = None, **headers: str) -> Answer:
        """Like `Served.ask`, but repeats the request while the front end is restarted, as clients do."""
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException):
                answer = super().ask(method, path, body, **headers)
                if answer.status not in (500, 503) or time.monotonic() > deadline:
                    return answer
            assert time.monotonic() < deadline, "the service does not come back"
            time.sleep(0.2)

    def record(self, video_id: str) -> dict[str, Any]:
        """A job as the store has it."""
        data = Objects(self.store).get(f"records/{video_id}.json")
        assert data is not None
        return dict(json.loads(data))


def after_first_segment(deployed: Deployed, body: Mapping[str, Any], steps: str) -> str:
    """A job of two segments of which one is in the store."""
    video_id = str(deployed.post({**body, "steps": steps})["id"])
    objects = Objects(deployed.store)
    wait_for(lambda: newest_state(objects, video_id) is not None, 60)
    return video_id
