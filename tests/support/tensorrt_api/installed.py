"""A simulated installation of a TensorRT library, and small stages to build and run with it."""

import dataclasses
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from scail2_rt.engines.folder.store import StoreLayout
from scail2_rt.export.models.config import ModelConfig
from scail2_rt.export.models.precision import Numerics
from scail2_rt.export.stages.spec import StageDefinition, TensorSpec
from tests.support.onnx_case import SMALL, STAGES, write_store
from tests.support.tensorrt_api.bindings import RTX, Unavailable
from tests.support.tensorrt_api.recorder import Recorder

CONFIG: ModelConfig = SMALL
GPU_BYTES = 100 << 30


@contextmanager
def installed(version: str) -> Iterator[Recorder]:
    """The library's name gives the recorder's module, on a machine with one card that it runs on; plans are compiled in
    this process. Skips when bindings cannot be had."""
    from scail2_rt.engines.tensorrt_backend import backend, builder, children, compiling, library, preflight, trust

    try:
        recorder = Recorder(version)
    except Unavailable as error:
        pytest.skip(f"no TensorRT bindings: {error}")
    gpu, name = preflight.GpuFacts(*card(version), GPU_BYTES), recorder.library.module
    with ExitStack() as stack:
        before = sys.modules.get(name)
        sys.modules[name] = recorder.module  # only this entry: modules imported meanwhile must stay
        stack.callback(lambda: sys.modules.pop(name) if before is None else sys.modules.update({name: before}))
        for module in (backend, builder, preflight, trust):
            stack.enter_context(mock.patch.object(module, "find_gpu", return_value=gpu))
        stack.enter_context(mock.patch.object(children, "Child", in_process(compiling)))
        forget_logger(library)
        yield recorder
        forget_logger(library)


def card(version: str) -> tuple[str, tuple[int, int]]:
    """A card that runs plans of this version."""
    return ("NVIDIA GeForce RTX 4090", (8, 9)) if version == RTX else ("NVIDIA H200", (9, 0))


def in_process(compiling: ModuleType) -> type:
    """Stand-in for the compiling process: does the job in this process, after the same serialisation."""

    class Child:
        def __init__(self, job: Any, environment: object) -> None:
            Path(job.log).unlink(missing_ok=True)
            self.job = job
            line = json.dumps(dataclasses.asdict(job))
            self._outcome = json.dumps(dataclasses.asdict(compiling.outcome_of(compiling.decode_job(line))))

        def outcome(self) -> Any:
            return compiling.Outcome(**json.loads(self._outcome))

        def kill(self) -> None:
            return

    return Child


def forget_logger(library: ModuleType) -> None:
    """The next use makes the process's logger again."""
    library.process_logger.cache_clear()
    library.process_log.cache_clear()


class Picture(nn.Module):
    """A VAE-like stage: picture [1, 3, 8h, 8w] and one cell per 8x8 square [1, 1, h, w], both doubled and joined."""

    def __init__(self, numerics: Numerics) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3, dtype=numerics.storage), requires_grad=False)

    def forward(self, picture: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
        return picture * self.weight[:, None, None], cells + picture[:, :1, ::8, ::8]


def _picture_io(numerics: Numerics) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    picture = TensorSpec("picture", numerics.compute, (1, 3, "8*h", "8*w"))
    cells = TensorSpec("cells", numerics.compute, (1, 1, "h", "w"))
    outputs = TensorSpec("picture_out", picture.dtype, picture.dims), TensorSpec("cells_out", cells.dtype, cells.dims)
    return (picture, cells), outputs


PICTURE = StageDefinition("vae.picture", Picture, _picture_io, {"weight": ("weight",)}, "vae.picture")


def small_stages() -> dict[str, StageDefinition]:
    """Stages that are traced quickly: rows, two fixed contexts, a text, two picture profiles."""
    names = ("dit.head", "dit.context", "umt5.final")
    return {**{name: STAGES[name] for name in names}, PICTURE.name: PICTURE}


def make_folder(directory: Path, stages: dict[str, StageDefinition], numerics: Numerics) -> StoreLayout:
    """An engine folder that has its weight store and nothing else."""
    (directory / "stages").mkdir(parents=True)
    return write_store(list(stages.values()), numerics, directory / "stages")
