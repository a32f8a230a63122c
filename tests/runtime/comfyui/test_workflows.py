"""The example workflows match the nodes' schemas, and the nodes work without `fcntl` (Windows)."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from scail2_rt.runtime.comfyui.installing import COMMAND_ONLY, PACK
from tests.runtime.test_imports import BLOCKED
from tests.support.comfyui_prompt import prompt_of
from tests.support.command import command_environment, unmeasured

pytest_plugins = ["tests.support.runtime_fixtures"]

# Of ComfyUI's own nodes: inputs with widgets, in the page's order (0.3.64).
OTHERS: dict[str, dict[str, Any]] = {
    "LoadImage": {"image": ["COMBO"]},
    "LoadVideo": {"file": ["COMBO"]},
    "SaveVideo": {"filename_prefix": ["STRING"], "format": ["COMBO"], "codec": ["COMBO"]},
    "PreviewAny": {},
}
KINDS = {"Int": "INT", "Float": "FLOAT", "String": "STRING", "Boolean": "BOOLEAN", "Combo": "COMBO"}


def info_of(node: Any) -> dict[str, Any]:
    """A node's schema as /object_info gives it, as far as widgets go."""
    inputs: dict[str, dict[str, Any]] = {"required": {}, "optional": {}}
    for given in node.define_schema().inputs:
        kind = KINDS.get(getattr(given, "kind", ""), "CONNECTION")
        controlled = {"control_after_generate": getattr(given, "control_after_generate", False)}
        inputs["optional" if getattr(given, "optional", False) else "required"][given.id] = [kind, controlled]
    return {"input": inputs}


@pytest.fixture
def info(nodes: ModuleType) -> dict[str, Any]:
    ours = {node.define_schema().node_id: info_of(node) for node in nodes.NODES}
    return {**ours, **{name: {"input": {"required": inputs}} for name, inputs in OTHERS.items()}}


@pytest.mark.parametrize("mode", ["animate", "replace"])
def test_every_value_is_one_that_its_widget_takes(mode: str, nodes: ModuleType, info: dict[str, Any]) -> None:
    workflow = json.loads((PACK / "example_workflows" / f"scail2_{mode}.json").read_text())
    prompt = prompt_of(workflow, info)
    schemas = {node.define_schema().node_id: node.define_schema() for node in nodes.NODES}
    seen = set()
    for node in prompt.values():
        if node["class_type"] not in schemas:
            file = node["inputs"].get("image") or node["inputs"].get("file")
            assert file is None or (PACK / "example_inputs" / file).is_file()
            continue
        seen.add(node["class_type"])
        for given in schemas[node["class_type"]].inputs:
            value = node["inputs"].get(given.id)
            if given.id == "folder":
                assert value == "sprites"
            elif given.kind == "Combo":
                assert value in given.options, given.id
            elif given.kind in ("Int", "Float"):
                assert given.min <= value <= given.max, given.id
            elif given.kind in ("String", "Boolean"):
                assert isinstance(value, str if given.kind == "String" else bool), given.id
            elif not getattr(given, "optional", False):
                assert isinstance(value, list), given.id
    assert seen == set(schemas) - {"Scail2BuildEngines"}


def test_node_names_and_inputs_are_unique(nodes: ModuleType) -> None:
    names = [node.define_schema().node_id for node in nodes.NODES]
    assert len(set(names)) == len(names)
    for node in nodes.NODES:
        schema = node.define_schema()
        ids = [entry.id for entry in (*schema.inputs, *schema.outputs)]
        assert len(set(ids)) == len(ids), schema.node_id  # ComfyUI refuses a schema in which one occurs twice


IN_COMFYUI = f"""
import asyncio
from pathlib import Path
from tests.support.comfyui_standins import standing_in

class Unneeded:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {(*(name.replace("-", "_") for name in COMMAND_ONLY), "onnxruntime", "triton")!r}:
            raise ImportError(f"No module named {{name!r}} (not needed by nodes)", name=name)

sys.meta_path.insert(0, Unneeded())
engines, case = map(Path, sys.argv[1:])
with standing_in(engines.parent / "models"):
    from scail2_rt.runtime.comfyui.pack import comfy_entrypoint
    nodes = asyncio.run(asyncio.run(comfy_entrypoint()).get_node_list())
    import scail2_rt.runtime.comfyui.extension as extension
    from tests.runtime.comfyui.conftest import graph_of
    from tests.runtime.comfyui.test_animate_node import inputs_of
    inputs = inputs_of(graph_of(case), extension, engines)
    masks = extension.MakeMasks.execute(mode="animate", set_background=True, colour="blue", sort="none", figures="",
        **{{name: inputs[name] for name in ("image", "driving", "reference_mask", "driving_mask")}}).args
    images = extension.Animate.execute(**{{**inputs, "reference_mask": masks[0], "driving_mask": masks[1]}}).args[0]
    print([node.__name__ for node in nodes], tuple(images.shape))
"""


def test_nodes_run_without_what_windows_and_graphs_lack(cache: Path, engines: Path, case: Path) -> None:
    """Neither `fcntl` nor `resource`, and none of the packages that the command line alone needs."""
    command = [sys.executable, "-c", BLOCKED + IN_COMFYUI, str(engines), str(case)]
    environment = unmeasured(command_environment(cache))
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=600)
    assert result.returncode == 0, result.stderr
    assert "(21, 64, 96, 3)" in result.stdout
