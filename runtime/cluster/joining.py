"""Connect to a running Ray cluster."""

import contextlib
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scail2_rt.kernels.errors import InputError

NAMESPACE = "scail2-rt"
KNOCK_S = 5.0


@contextlib.contextmanager
def joined(address: str) -> Iterator[None]:
    """Connect to the cluster at `address` (HOST:PORT, or auto) as a driver. Raises InputError if none answers."""
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")  # Ray's default retries for 15 minutes
    try:
        import ray
    except ImportError as error:
        raise InputError("--ray needs Ray. Install it with pip install 'scail2-rt[ray]'.") from error
    try:
        _knock(address)
        ray.init(address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        said = str(error).splitlines()[0][:200]
        raise InputError(
            f"No Ray cluster answers at {address} ({said}). Start one with `ray start --head`, and run this command on "
            "one of its machines."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Raises OSError if nothing listens at `address`. Ray's own timeout is much longer."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise InputError(f"--ray must be HOST:PORT or auto, not {address}.")
    socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_S).close()


def share_of_node(gpus_each: int) -> tuple[dict[str, Any], int]:
    """(Ray resources of one session, number of sessions that fit the cluster now). With GPUs, a session takes
    `gpus_each` GPUs and one CPU; without, one CPU, and one session per node is counted. Raises InputError if the
    cluster has too few GPUs."""
    import ray

    gpus = int(ray.cluster_resources().get("GPU", 0))
    if gpus:
        if gpus < gpus_each:
            raise InputError(f"{gpus_each} GPUs per video are more than the {gpus} of the cluster. Give fewer.")
        return {"num_gpus": gpus_each, "num_cpus": 1}, gpus // gpus_each
    if gpus_each > 1:
        raise InputError("The cluster has no GPU. Leave the number of GPUs out to run on its CPUs.")
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    return {"num_cpus": 1}, max(1, len(nodes))


def scratch_folder(kind: str) -> Path:
    """Make a temporary folder for this process, and remove those of processes that no longer exist."""
    for left in Path(tempfile.gettempdir()).glob(f"scail2-rt-{kind}-*-*"):
        if not Path(f"/proc/{left.name.split('-')[3]}").exists():
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"scail2-rt-{kind}-{os.getpid()}-"))
