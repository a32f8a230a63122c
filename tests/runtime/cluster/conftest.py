"""One cluster and one service per test file: a head node without CPUs, and two nodes of one CPU. The service has
at most one replica at first."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.command import command_environment

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

    from tests.support.ray_cluster import Deployed


@pytest.fixture(scope="module")
def cluster(cache: Path) -> "Iterator[Cluster]":
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'scail2-rt[ray]'")
    from tests.support.ray_cluster import nodes

    with nodes(2, command_environment(cache)) as made:
        yield made


@pytest.fixture(scope="module")
def deployed(cluster: "Cluster", engines: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> "Deployed":
    from tests.support.ray_cluster import Deployed

    data = str(tmp_path_factory.mktemp("store"))
    return Deployed(data, cache, cluster.address).deploy(engines, "--gpus", "1")
