"""Reading a fixture folder and reporting on it.

The format: one folder per subject; `X_weights`, `X_taps` and `X_expected` beside `X`; metadata strings in the
safetensors files. Case names are arbitrary; a fixture is recognised by its folder and its tensors.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from scail2_rt.engines.build.build import BuildRequest, build
from scail2_rt.engines.engine_set import DEFAULT_EXECUTION, EngineSet, open_engines
from scail2_rt.export.checkpoint.derive import clip_config, dit_config, umt5_config, vae_config
from scail2_rt.export.checkpoint.open import Checkpoint
from scail2_rt.export.checkpoint.tensors import MappingSource, TensorSource, shapes_of
from scail2_rt.export.models.config import ModelConfig
from scail2_rt.export.models.precision import Component
from scail2_rt.runtime.distributed.leading import LeadingConstants
from scail2_rt.runtime.distributed.opening import open_on
from scail2_rt.runtime.distributed.team import Team
from scail2_rt.runtime.pipeline.constants import Constants


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison. error: in the units of `tolerance`, the maximum absolute difference unless the name says
    otherwise."""

    name: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # NaN fails

    def __str__(self) -> str:
        """Four fields with one blank between them."""
        name = self.name.replace(" ", ":")
        return f"{'PASS' if self.passed else 'FAIL'} {name} {self.error:.3g} {self.tolerance:.3g}"


@dataclass(frozen=True, slots=True)
class Fixture:
    """One safetensors file: tensors and metadata (JSON strings already parsed where they are JSON)."""

    path: Path
    name: str
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, Any]

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def groups(self, *members: str) -> Iterator[str]:
        """The prefixes P such that `P.member` exists for every member."""
        first = f".{members[0]}"
        for key in self.tensors:
            prefix = key.removesuffix(first)
            if prefix != key and all(f"{prefix}.{member}" in self.tensors for member in members):
                yield prefix

    def raw_metadata(self) -> dict[str, str]:
        return {key: value if isinstance(value, str) else json.dumps(value) for key, value in self.metadata.items()}

    def part(self, prefix: str) -> "Fixture":
        """The tensors whose names start with `prefix`, without it."""
        tensors = {key[len(prefix) :]: value for key, value in self.tensors.items() if key.startswith(prefix)}
        return Fixture(self.path, self.name, tensors, self.metadata)

    def weights(self) -> dict[str, Tensor]:
        """All tensors, floating ones as fp32."""
        return {key: value.float() if value.is_floating_point() else value for key, value in self.tensors.items()}


class Golden:
    """A fixture folder, and the engines made from its weights: one engine folder for each set of weight files, kept
    until the end. gpus: processes that share the transformer's work. A context manager."""

    def __init__(self, root: Path, backend: str = "torch", device: str = "cpu", gpus: int = 1) -> None:
        self.root, self.backend, self.device, self.gpus = root, backend, device, gpus
        self._engines: dict[tuple[str, ...], EngineSet] = {}
        self._teams: dict[EngineSet, Team] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "Golden":
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def load(self, relative: str | Path) -> Fixture:
        path = self.root / relative
        with safe_open(path, "pt") as file:
            metadata = {key: _parsed(value) for key, value in (file.metadata() or {}).items()}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        return Fixture(path, str(path.relative_to(self.root)), tensors, metadata)

    def names(self, path: Path) -> list[str]:
        with safe_open(path, "pt") as file:
            return list(file.keys())

    def json(self, path: Path) -> Any:
        return json.loads(path.read_text())

    def with_tensor(self, folder: str, tensor: str) -> Fixture:
        """The file of a folder that contains the named tensor."""
        for path in sorted((self.root / folder).glob("*.safetensors")):
            if tensor in self.names(path):
                return self.load(path.relative_to(self.root))
        raise LookupError(f"no file in {folder}/ holds a tensor {tensor!r}")

    def engines(self, **parts: Fixture) -> EngineSet:
        """Engines of the components `dit`, `vae`, `clip`, `umt5` with these weights, in fp32."""
        key = tuple(f"{component}={fixture.name}" for component, fixture in sorted(parts.items()))
        if key not in self._engines:
            directory = Path(self._stack.enter_context(TemporaryDirectory()))
            sources = {c: MappingSource(f.weights(), f.raw_metadata()) for c, f in parts.items()}
            engines = build_and_open(directory, sources, self.backend, self.device)
            self._stack.callback(engines.close)
            self._engines[key] = engines
        return self._engines[key]

    def constants(self, engines: EngineSet) -> Constants:
        """New constants of these engines, shared by `gpus` processes."""
        if self.gpus == 1:
            return Constants(engines)
        if engines not in self._teams:
            opener = partial(open_on, engines.directory, self.backend, DEFAULT_EXECUTION)
            self._teams[engines] = Team(self.gpus, engines.device, opener)
            self._stack.callback(self._teams[engines].close)
        return LeadingConstants(engines, self._teams[engines])


_CONFIGS = {"dit": dit_config, "vae": vae_config, "umt5": umt5_config, "clip": clip_config}


def build_and_open(directory: Path, sources: dict[Component, TensorSource], backend: str, device: str) -> EngineSet:
    """An fp32 engine folder of these components, built and opened as the command line does it."""
    config = ModelConfig(
        **{name: _CONFIGS[name](shapes_of(source), source.metadata) for name, source in sources.items()}
    )
    checkpoint = Checkpoint(directory, config, sources, None)
    build(BuildRequest(directory, directory / "engines", (backend,), "fp32"), checkpoint)
    return open_engines(directory / "engines", backend, device=device)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def difference(actual: Tensor | np.ndarray, expected: Tensor) -> float:
    """Maximum absolute difference; infinite when the shapes differ."""
    actual = torch.as_tensor(actual).detach().cpu()
    if actual.shape != expected.shape:
        return float("inf")
    if actual.numel() == 0:
        return 0.0
    return (actual.double() - expected.double()).abs().max().item()


def compare(name: str, actual: Tensor | np.ndarray, expected: Tensor, tolerance: float) -> Row:
    return Row(name, difference(actual, expected), tolerance)


def unknown(name: str) -> Row:
    """A fixture that no comparison supports: always a failure."""
    return Row(f"{name} (cannot be run)", float("inf"), 0.0)


def exact(name: str, same: bool) -> Row:
    """A comparison without a scale: error 0 or 1."""
    return Row(name, 0.0 if same else 1.0, 0.0)
