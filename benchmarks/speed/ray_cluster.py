"""Measure the service on a Ray cluster against the service on one machine, and the speed of the cluster's ledger.

`python -m scail2_rt.benchmarks.speed.ray_cluster figures ENGINES --case DIR` starts a cluster on this machine, with a
head node and two nodes of one CPU each, and stops it at the end. It measures the overhead of a job beyond its
generation, on one machine and in the cluster; the time from the kill of a node to the next step of its job; and a queue
of 2,000 jobs. `… throughput URL --data DATA --case DIR --videos N --replicas R` measures a running service: videos per
hour with N jobs queued (a multiple of R), after R replicas have started and each has made videos of this case.
`… ledger DATA_URL` measures only the ledger, without a cluster, on a folder or s3://. The last line is JSON.
"""

import argparse
import asyncio
import collections
import contextlib
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from scail2_rt.runtime.cluster.ledger import Ledger, newest_state, open_ledger
from scail2_rt.runtime.cluster.objects import Objects
from scail2_rt.runtime.core.case_folder import read_case
from scail2_rt.runtime.serve.wire import Wire
from scail2_rt.runtime.session.report import file_hash

COMMAND = (sys.executable, "-m", "scail2_rt.runtime.cli.main")
HOST = "127.0.0.2"  # a loopback address that Ray does not replace by that of a network card
QUEUED = 2000
WARM_VIDEOS = 2  # that each replica makes before the throughput is measured: the first loads weights
WARM_ROUNDS = 20
NAMES = ("input_reference", "mask_reference", "video_reference", "video_mask_reference")
SOON = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000, "health_check_failure_threshold": 5}


def body_of(wire: Wire, case: Path, options: Mapping[str, str]) -> dict[str, Any]:
    files = read_case(case)
    given = zip(NAMES, (files.image, files.mask_image, files.driving, files.mask_video), strict=True)
    kept = {name: {"file_id": wire.keep(path, file_hash(path))} for name, path in given}
    return {**kept, "prompt": "a man walks", **options}


def done(wire: Wire, video_id: str) -> dict[str, Any]:
    """Wait for a job and return its video object. Reconnects if the event stream ends early."""
    for kind, video in wire.events(f"/v1/videos/{video_id}/events"):
        if kind == "completed":
            return dict(video)
        if kind == "failed":
            raise RuntimeError(video["error"]["message"])
    return done(wire, video_id)


def beyond(wire: Wire, body: Mapping[str, Any], videos: int) -> list[float]:
    """Seconds from the request to the end of a job, minus the generation, for each of `videos` jobs."""
    seconds = []
    for _ in range(videos + 1):
        began = time.perf_counter()
        video = done(wire, wire.ask("POST", "/v1/videos", dict(body))["id"])
        seconds.append(time.perf_counter() - began - video["inference_time_s"])
    return seconds[1:]  # the first job loads weights


@contextlib.contextmanager
def one_machine(engines: Path, data: Path) -> Iterator[Wire]:
    words = [*COMMAND, "serve", str(engines), "--data", str(data), "--port", "0", "--no-warm"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        yield Wire(process.stdout.readline().strip(), None)
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def cluster_of(count: int) -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    head = {"num_cpus": 0, "object_store_memory": 80 << 20, "node_ip_address": HOST, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={**head, "_system_config": SOON})
    try:
        for _ in range(count):
            add_node(cluster)
        yield cluster
    finally:
        cluster.shutdown()


def add_node(cluster: Any) -> None:
    cluster.add_node(num_cpus=1, object_store_memory=80 << 20, node_ip_address=HOST)


def deploy(engines: Path, data: Path, address: str) -> Wire:
    words = [*COMMAND, "serve", str(engines), "--ray", address, "--data", str(data), "--port", "0", "--no-warm"]
    words += ["--max-queue", "100000", "--max-queue-per-key", "100000"]
    return Wire(subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip(), None)


def killed_node(cluster: Any, wire: Wire, body: Mapping[str, Any], data: Path) -> float:
    """Seconds from the kill of a node to the first step of its job on another node."""
    objects = Objects(str(data))
    video_id = wire.ask("POST", "/v1/videos", {**body, "steps": "300"})["id"]
    while newest_state(objects, video_id) is None:
        time.sleep(0.05)
    folder = next(Path(tempfile.gettempdir()).glob(f"scail2-rt-replica-*-*/{video_id}"))
    stat = Path(f"/proc/{folder.parent.name.split('-')[3]}/stat").read_text()
    raylet = int(stat.rpartition(")")[2].split()[1])
    node = next(node for node in cluster.worker_nodes if node.all_processes["raylet"][0].process.pid == raylet)
    began = time.perf_counter()
    threading.Thread(target=cluster.remove_node, args=(node, False)).start()
    while json.loads(objects.get(f"records/{video_id}.json") or b"{}")["attempt"] < 2:
        time.sleep(0.02)
    while wire.ask("GET", f"/v1/videos/{video_id}").get("phase") != "denoise":
        time.sleep(0.02)
    seconds = time.perf_counter() - began
    done(wire, video_id)
    add_node(cluster)
    return seconds


def cpu_seconds(title: str) -> float:
    """The CPU seconds used so far by the process that Ray gave this title."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().decode(errors="replace").startswith(title):
                fields = path.with_name("stat").read_text().rpartition(")")[2].split()
                return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    raise RuntimeError(f"no process is called {title}")


def long_queue(cluster: Any, wire: Wire, data: Path) -> dict[str, float]:
    """Queue 2,000 jobs for engines that no replica has, and measure the ledger's times and CPU use."""
    import ray

    ray.init(cluster.address, namespace="scail2-rt", log_to_driver=False, logging_level=logging.ERROR)
    ledger = open_ledger(str(data))
    facts = {"frames": 21, "frame_rate": "16", "width": 96, "height": 64, "mode": "animate", "segments": 2}
    facts |= {"framing": "", "warnings": []}
    request = {"engines": "none", "encodings": "p", "options": {}, "extra_refs": 0, "masking": None, "facts": facts}
    ray.get(ledger.begin.remote())
    began, cpu = time.perf_counter(), cpu_seconds("ray::Ledger")
    adding = [ledger.ask.remote("add_job", f"video_{n}", "local", request, None, "d") for n in range(QUEUED)]
    ray.get(adding)
    added_s, added_cpu = time.perf_counter() - began, cpu_seconds("ray::Ledger") - cpu
    cpu = cpu_seconds("ray::Ledger")
    ray.get([ledger.heard.remote("video_1", 1, {}) for _ in range(QUEUED)])
    heard_cpu = cpu_seconds("ray::Ledger") - cpu
    pages, asks = [], []
    for _ in range(20):
        began = time.perf_counter()
        wire.ask("GET", "/v1/videos?limit=100")
        pages.append(time.perf_counter() - began)
        began = time.perf_counter()
        wire.ask("GET", "/v1/videos/video_1000")
        asks.append(time.perf_counter() - began)
    ray.kill(ledger, no_restart=False)
    began = time.perf_counter()
    assert ray.get(ledger.ask.remote("place", ray.get(ledger.ask.remote("job", "video_1999")))) >= QUEUED - 1
    restart_s = time.perf_counter() - began
    for number in range(QUEUED):
        ledger.ask.remote("delete_job", f"video_{number}")
    ray.shutdown()
    return {
        "queued": QUEUED,
        "added_per_s": QUEUED / added_s,
        "ledger_cpu_ms_per_add": 1e3 * added_cpu / QUEUED,
        "ledger_cpu_ms_per_word": 1e3 * heard_cpu / QUEUED,
        "page_of_100_s": statistics.median(pages),
        "status_s": statistics.median(asks),
        "ledger_restart_s": restart_s,
    }


def figures(engines: Path, case: Path, options: Mapping[str, str], videos: int, kills: int) -> dict[str, Any]:
    found: dict[str, Any] = {"cpus": os.cpu_count(), "load_at_start": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as folder:
        with one_machine(engines, Path(folder) / "one") as wire:
            alone = beyond(wire, body_of(wire, case, options), videos)
        with cluster_of(2) as cluster:
            data = Path(folder) / "cluster"
            wire = deploy(engines, data, cluster.address)
            body = body_of(wire, case, options)
            spread = beyond(wire, body, videos)
            found["beyond_generation_s"] = {"one_machine": alone, "cluster": spread}
            found["overhead_s"] = statistics.median(spread) - statistics.median(alone)
            print(json.dumps(found), flush=True)
            found["killed_node_s"] = [killed_node(cluster, wire, body, data) for _ in range(kills)]
            print(json.dumps(found), flush=True)
            found["queue"] = long_queue(cluster, wire, data)
    return found


def made_by(wire: Wire, objects: Objects, body: Mapping[str, Any], videos: int) -> collections.Counter[str]:
    """Queue `videos` jobs, wait for them, and return how many each replica made, from the service's records."""
    made = [wire.ask("POST", "/v1/videos", {**body, "seed": str(number)})["id"] for number in range(videos)]
    for video_id in made:
        done(wire, video_id)
    records = [json.loads(objects.get(f"records/{video_id}.json") or b"{}") for video_id in made]
    return collections.Counter(json.loads(record["result"])["replica"] for record in records)


def throughput(
    url: str, data: str, case: Path, options: Mapping[str, str], videos: int, replicas: int
) -> dict[str, Any]:
    """Videos per hour of a service with `videos` jobs queued. Before, queues jobs until `replicas` replicas have made
    `WARM_VIDEOS` videos each, because Ray Serve starts replicas only while jobs wait. data: the service's --data."""
    wire, objects = Wire(url, os.environ.get("SCAIL2_RT_API_KEY")), Objects(data)
    body = body_of(wire, case, options)
    began = time.perf_counter()
    warm: collections.Counter[str] = collections.Counter()
    for _ in range(WARM_ROUNDS):
        warm += made_by(wire, objects, body, WARM_VIDEOS * replicas)
        ready = sum(made >= WARM_VIDEOS for made in warm.values())
        if ready >= replicas:
            break
    else:
        raise RuntimeError(f"{ready} of {replicas} replicas are ready after {warm.total()} videos: see `serve status`")
    warm_s, began = time.perf_counter() - began, time.perf_counter()
    made = made_by(wire, objects, body, videos)
    per_hour = 3600 * videos / (time.perf_counter() - began)
    return {
        "videos": videos,
        "videos_per_hour": per_hour,
        "by_replica": made,
        "warm_up": {"seconds": warm_s, "by_replica": warm},
    }


def ledger_alone(data: str, jobs: int = 300) -> dict[str, float]:
    """Milliseconds of the ledger per job and per message, for single jobs and for 64 concurrent ones. The times include
    the object store."""

    async def measure() -> dict[str, float]:
        ledger = Ledger(data)
        request = {"engines": "e", "encodings": "p", "options": {}}

        async def life(name: str) -> None:
            await ledger.ask("add_job", name, "local", request, None, "d")
            row = await ledger.claim(name, "e")
            assert row is not None
            await ledger.heard(name, row.attempt, {"event": {"phase": "denoise", "step": 1}})
            await ledger.heard(name, row.attempt, {"done": {"frames": 1}})

        began = time.perf_counter()
        for number in range(jobs // 10):
            await life(f"video_a{number}")
        alone_s = (time.perf_counter() - began) / (jobs // 10)
        began, cpu = time.perf_counter(), time.process_time()
        for first in range(0, jobs, 64):
            await asyncio.gather(*(life(f"video_b{number}") for number in range(first, min(first + 64, jobs))))
        many_s = (time.perf_counter() - began) / jobs
        cpu_s = (time.process_time() - cpu) / jobs
        await ledger.ask("add_job", "video_c", "local", request, None, "d")
        row = await ledger.claim("video_c", "e")
        assert row is not None
        began = time.perf_counter()
        for _ in range(2000):
            await ledger.heard("video_c", row.attempt, {})
        heard_s = (time.perf_counter() - began) / 2000
        return {
            "job_ms": alone_s * 1e3,
            "job_of_64_ms": many_s * 1e3,
            "job_cpu_ms": cpu_s * 1e3,
            "word_ms": heard_s * 1e3,
        }

    return asyncio.run(measure())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("figures", "throughput", "ledger"))
    parser.add_argument("where", help="ENGINES, URL or DATA_URL")
    parser.add_argument("--case", type=Path)
    parser.add_argument("--videos", type=int, default=10)
    parser.add_argument("--data", help="of throughput: the folder or URL given to `serve --data`")
    parser.add_argument("--replicas", type=int, default=1, help="of throughput: replicas that must make videos")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="set a field of the request")
    given = parser.parse_args()
    options = dict(pair.partition("=")[::2] for pair in given.set)
    if given.what == "figures":
        found = figures(Path(given.where), given.case, options, given.videos, given.kills)
    elif given.what == "throughput":
        if given.data is None or given.videos % given.replicas:
            parser.error("throughput needs --data, and a number of --videos that is a multiple of --replicas")
        found = throughput(given.where, given.data, given.case, options, given.videos, given.replicas)
    else:
        found = ledger_alone(given.where)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
