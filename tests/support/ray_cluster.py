"""A Ray cluster of several small nodes on this machine, which is gone afterwards with all its processes."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from ray.cluster_utils import Cluster

HOST = "127.0.0.2"  # loopback by a name that Ray does not replace by the address of a network card
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
    """`count` nodes of one CPU beside the head. environment: of every process of the cluster."""
    before = dict(os.environ)
    os.environ.update({**environment, **QUIET})
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
