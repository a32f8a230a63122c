"""A stand-in for ComfyUI, the nodes in it, and a case as tensors of its graph."""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from scail2_rt.runtime.media.images import load_image
from scail2_rt.runtime.media.video_reader import VideoReader
from tests.support.comfyui_standins import Host, standing_in


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with standing_in(tmp_path_factory.mktemp("comfyui") / "models") as found:
        yield found
        importlib.import_module("scail2_rt.runtime.comfyui.sessions").WARM.drop()


@pytest.fixture(scope="module")
def nodes(host: Host) -> ModuleType:
    return importlib.import_module("scail2_rt.runtime.comfyui.extension")


@dataclass(frozen=True, slots=True)
class Graph:
    """A case as tensors of a graph, float [B, H, W, 3], and as uint8 arrays."""

    arrays: dict[str, np.ndarray]

    def __getitem__(self, name: str) -> Any:
        pixels = torch.from_numpy(self.arrays[name]) / 255
        return pixels if pixels.ndim == 4 else pixels[None]


def graph_of(case: Path, mask: str = "rendered_mask_v2.mp4") -> Graph:
    arrays = {"image": load_image(case / "ref.png"), "reference_mask": load_image(case / "ref_mask.png")}
    for name, file in (("driving", "rendered_v2.mp4"), ("driving_mask", mask)):
        with VideoReader(case / file) as reader:
            arrays[name] = reader.read(1000)
    return Graph(arrays)


@pytest.fixture(scope="session")
def graph(case: Path) -> Graph:
    return graph_of(case)
