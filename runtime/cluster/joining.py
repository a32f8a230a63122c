"""Connecting to a cluster that is there."""

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
    """This program as a driver of the cluster at `address` (HOST:PORT, or auto). InputError when none answers."""
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")  # it would try for a quarter of an hour
    try:
        import ray
    except ImportError as error:
        raise InputError("--ray needs Ray: pip install 'scail2-rt[ray]'.") from error
    try:
        _knock(address)
        ray.init(address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        said = str(error).splitlines()[0][:200]
        raise InputError(
            f"No Ray cluster answers at {address} ({said}): start one with `ray start --head`, and run this command on "
            "one of its machines."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """OSError where nobody listens; Ray itself waits long."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise InputError(f"--ray takes HOST:PORT or auto, not {address}.")
    socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_S).close()


def share_of_node(gpus_each: int) -> tuple[dict[str, Any], int]:
    """(what one session takes of a node, how many sessions the cluster holds now): GPUs where there are any, else one
    CPU, and one session per node."""
    import ray

    gpus = int(ray.cluster_resources().get("GPU", 0))
    if gpus:
        if gpus < gpus_each:
            raise InputError(f"{gpus_each} GPUs per video are more than the {gpus} of the cluster.")
        return {"num_gpus": gpus_each, "num_cpus": 1}, gpus // gpus_each
    if gpus_each > 1:
        raise InputError("The cluster has no GPU: leave the number of GPUs out to run on its CPUs.")
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    return {"num_cpus": 1}, max(1, len(nodes))


def scratch_folder(kind: str) -> Path:
    """A folder of this process; those of processes that were killed go now."""
    for left in Path(tempfile.gettempdir()).glob(f"scail2-rt-{kind}-*-*"):
        if not Path(f"/proc/{left.name.split('-')[3]}").exists():
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"scail2-rt-{kind}-{os.getpid()}-"))
