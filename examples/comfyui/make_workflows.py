"""Writes the two example workflows, in the format that ComfyUI's page saves, from the short description below.

python examples/comfyui/make_workflows.py runtime/comfyui/pack/example_workflows"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Link = tuple[str, int]  # name of a node, index of its output
NOTE = """## SCAIL-2: {mode}

These values are for the small drawn model that comes with the package (`scail2-rt comfyui install PATH --sprites`).

For your own checkpoint: build engines with the node **SCAIL-2 Build engines** or with `scail2-rt build-engines`, \
choose the folder in **SCAIL-2 Engines**, and in **SCAIL-2 Animate** set width and height to 0 (or multiples of 32), \
the preset to *fast* (with a step-distilled LoRA) or *quality*, and segment_length to 81."""
PROMPTS = {
    "animate": "a man in a white shirt and orange trousers stretches",
    "replace": "a man in a black shirt and white trousers stretches",
}


def description(mode: str) -> dict[str, dict[str, Any]]:
    """Name of a node → type, position, size, inputs (name → link), widget values, outputs (name, type)."""
    image, video, mask = ("IMAGE", "VIDEO", "SCAIL2_MASK")
    pictures = {"image": ("reference", 0), "driving": ("driving", 0)}
    masks = {"reference_mask": ("masks", 0), "driving_mask": ("masks", 1)}
    sampling = ["as set below", 2, "unipc", 3.0, 1.0, 0, "fixed", 16.0, 0, 0]
    segmenter = ["auto", "", "human. character.", 2, "", ""]
    saved = ["video/scail2", "auto", "auto"]
    more = ["", 33, 5, 0, "off", False, False]
    files = {role: f"scail2_{mode}_{role}" for role in ("ref", "ref_mask", "driving", "driving_mask")}
    loaded, film = [("IMAGE", image), ("MASK", "MASK")], [(video, video)]
    return {
        "note": {"type": "MarkdownNote", "at": (-460, -260), "size": (420, 260), "values": [NOTE.format(mode=mode)]},
        "reference": _node("LoadImage", (-460, 60), (270, 300), {}, [f"{files['ref']}.png", "image"], loaded),
        "mask": _node("LoadImage", (-460, 470), (270, 300), {}, [f"{files['ref_mask']}.png", "image"], loaded),
        "driving": _node("LoadVideo", (-160, 60), (270, 300), {}, [f"{files['driving']}.mp4", "image"], film),
        "driving mask": _node(
            "LoadVideo", (-160, 470), (270, 300), {}, [f"{files['driving_mask']}.mp4", "image"], film
        ),
        "masks": _node(
            "Scail2Masks",
            (150, 60),
            (330, 940),
            {**pictures, "reference_mask": ("mask", 0), "driving_mask": ("driving mask", 0)},
            [mode, True, "blue", "left-to-right", "", *segmenter],
            [("reference_mask", mask), ("driving_mask", mask), ("findings", "STRING")],
        ),
        "engines": _node(
            "Scail2Engines",
            (150, -170),
            (330, 180),
            {},
            ["sprites", "", "auto", "auto", 0],
            [("engines", "SCAIL2_ENGINES")],
        ),
        "window": _node(
            "Scail2PreviewWindow",
            (960, 700),
            (400, 460),
            {**pictures, **masks},
            ["auto", 128, 128, "auto"],
            [("sheet", image), ("findings", "STRING")],
        ),
        "animate": _node(
            "Scail2Animate",
            (520, -260),
            (400, 1100),
            {"engines": ("engines", 0), **pictures, **masks, "audio": None},
            [PROMPTS[mode], "auto", 128, 128, "auto", *sampling, *more],
            [("images", image), ("video", video), ("report", "STRING")],
        ),
        "save": _node("SaveVideo", (960, -260), (400, 420), {"video": ("animate", 1)}, saved, []),
        "report": _node("PreviewAny", (960, 210), (400, 440), {"source": ("animate", 2)}, [], [("STRING", "STRING")]),
    }


def _node(
    kind: str,
    at: tuple[int, int],
    size: tuple[int, int],
    inputs: Mapping[str, Link | None],
    values: Sequence[Any],
    outputs: Sequence[tuple[str, str]],
) -> dict[str, Any]:
    return {"type": kind, "at": at, "size": size, "inputs": inputs, "values": values, "outputs": outputs}


def workflow(nodes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The JSON document of a workflow."""
    numbers = {name: number for number, name in enumerate(nodes, 1)}
    links: list[list[Any]] = []
    written = []
    for name, node in nodes.items():
        inputs = []
        for slot, (title, link) in enumerate(node.get("inputs", {}).items()):
            kind = "*" if link is None else nodes[link[0]]["outputs"][link[1]][1]
            inputs.append({"name": title, "type": "AUDIO" if link is None else kind, "link": None})
            if link is not None:
                inputs[-1]["link"] = len(links) + 1
                links.append([len(links) + 1, numbers[link[0]], link[1], numbers[name], slot, kind])
        written.append(
            {
                "id": numbers[name],
                "type": node["type"],
                "pos": list(node["at"]),
                "size": list(node["size"]),
                "flags": {},
                "order": numbers[name] - 1,
                "mode": 0,
                "inputs": inputs,
                "outputs": [{"name": title, "type": kind, "links": []} for title, kind in node.get("outputs", ())],
                "properties": {"Node name for S&R": node["type"]},
                "widgets_values": list(node["values"]),
            }
        )
    for link in links:
        written[link[1] - 1]["outputs"][link[2]]["links"].append(link[0])
    return {
        "last_node_id": len(nodes),
        "last_link_id": len(links),
        "nodes": written,
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def main(folder: Path) -> None:
    for mode in PROMPTS:
        text = json.dumps(workflow(description(mode)), indent=1) + "\n"
        (folder / f"scail2_{mode}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
