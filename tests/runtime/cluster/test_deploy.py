"""Which replicas a second `serve --ray` replaces: Ray Serve keeps those whose deployment has the same version. The
cluster is replaced by fakes."""

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scail2_rt.runtime.cli.main import cli
from scail2_rt.runtime.cluster import deploy

pytest.importorskip("ray", reason="Ray is not installed: pip install 'scail2-rt[ray]'")


class FakeCluster:
    """Records the engines' application that `deploy` gives to Ray Serve. statuses: of the applications, by name."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.statuses: dict[str, str] = {}
        self.applications: dict[str, Any] = {}
        self._data = str(folder / "data")
        (folder / "manifest.json").write_text("{}")
        self._engines = str(folder)
        ledger = SimpleNamespace(begin=SimpleNamespace(remote=lambda: self._data))
        monkeypatch.setattr(deploy, "joined", lambda address: contextlib.nullcontext())
        monkeypatch.setattr(deploy, "share_of_node", lambda each: ({"num_cpus": 1}, 4))
        monkeypatch.setattr(deploy, "open_ledger", lambda data: ledger)
        monkeypatch.setattr(deploy, "_run", lambda apps, wait: self.applications.update(apps))
        monkeypatch.setattr("ray.get", lambda reference: reference)
        monkeypatch.setattr("ray.serve.start", lambda **options: None)
        monkeypatch.setattr("ray.serve.status", self._status)

    def _status(self) -> Any:
        found = {name: SimpleNamespace(status=status) for name, status in self.statuses.items()}
        return SimpleNamespace(applications=found)

    def deploy(self, gpus: str) -> tuple[str, str | None]:
        """Run `serve --ray`. Returns the name of the engines' application and the version of its deployment."""
        serve: Any = cli.commands["serve"]
        options = serve.make_context("serve", [self._engines, "--gpus", gpus, "--data", self._data]).params
        deploy.deploy(self._engines, options, "auto")
        name = next(name for name in self.applications if name != deploy.FRONT)
        return name, self.applications[name][0]._bound_deployment.version


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCluster:
    return FakeCluster(tmp_path, monkeypatch)


def test_another_number_of_gpus_keeps_running_replicas(cluster: FakeCluster) -> None:
    name, version = cluster.deploy("1")
    assert version is not None
    cluster.statuses[name] = "RUNNING"
    assert cluster.deploy("2") == (name, version)


@pytest.mark.parametrize("status", deploy.FAILED)
def test_a_failed_application_is_restarted(cluster: FakeCluster, status: str) -> None:
    name, _ = cluster.deploy("1")
    cluster.statuses[name] = status
    assert cluster.deploy("1") == (name, None)  # Ray Serve then draws a new version
