"""The files of examples/ray: Ray can read them, and the objects that they name exist."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("ray")

from ray.serve.deployment import Application
from ray.serve.schema import ServeDeploySchema

from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.cluster import config

EXAMPLES = Path(__file__).parents[3] / "examples" / "ray"


def configs() -> list[Any]:
    manifest = yaml.safe_load((EXAMPLES / "kuberay.yaml").read_text())
    assert manifest["kind"] == "RayService"
    return [yaml.safe_load((EXAMPLES / "serve.yaml").read_text()), yaml.safe_load(manifest["spec"]["serveConfigV2"])]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for data and engines, and no cluster."""
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines" / "manifest.json").write_text("{}")
    monkeypatch.setattr(config, "open_ledger", lambda data: None)
    return tmp_path


@pytest.mark.parametrize("document", configs(), ids=["serve", "kuberay"])
def test_an_example_is_read_by_ray_and_builds_its_applications(document: Any, here: Path) -> None:
    read = ServeDeploySchema.model_validate(document)
    assert [app.name for app in read.applications] == ["engines-a", "front"]
    for app in read.applications:
        module, _, name = app.import_path.partition(":")
        builder = getattr(importlib.import_module(module), name)
        args = {**app.args, "engines": str(here / "engines"), "data": str(here / "data")}
        assert isinstance(builder(args), Application)


def test_arguments_are_checked(here: Path) -> None:
    with pytest.raises(InputError, match="lack data"):
        config.engines({"engines": str(here / "engines")})
    with pytest.raises(InputError, match=r"gpu is not an argument.* Use engines, .*queued, .*replicas"):
        config.engines({"engines": str(here / "engines"), "data": str(here), "gpu": 1})
    with pytest.raises(InputError, match="Give --api-key-file"):
        config.front({"engines": str(here / "engines"), "data": str(here), "host": "0.0.0.0"})
    with pytest.raises(InputError, match="is not an engine folder"):
        config.front({"engines": str(here), "data": str(here)})
