"""Comparison of the files of an engine folder with its manifest and with its checkpoint.

The weight store is compared with a new conversion of the checkpoint: the conversion of the build runs again, with a
writer that compares instead of writing. Conversions are exact and repeatable, so that any different bit is a fault. The
exception are tensors with a fused LoRA. Their products are sums whose order depends on the machine, so that values may
differ by one rounding step.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor

from scail2_rt.engines.build.assemble import EMBEDDING_SOURCE
from scail2_rt.engines.folder.damage import CHECK
from scail2_rt.engines.folder.manifest import TABLES, TOKENIZER, Manifest
from scail2_rt.engines.folder.sources import LORA_PART, TOKENIZER_PART, file_groups, hash_file, hash_sources
from scail2_rt.engines.folder.store import WeightStore
from scail2_rt.engines.folder.weights import EMBEDDING, planned_tensors, runtime_tables, write_stage
from scail2_rt.engines.observer import BuildObserver, Phase
from scail2_rt.export.stages.spec import StageDefinition
from scail2_rt.kernels.errors import InputError, Scail2Error
from scail2_rt.kernels.wording import counted

if TYPE_CHECKING:
    from scail2_rt.export.checkpoint.open import Checkpoint
    from scail2_rt.export.checkpoint.tensors import TensorSource

Verdict = tuple[bool, str]
_LISTED = 5


def check_files(directory: Path, manifest: Manifest, observer: BuildObserver) -> Verdict:
    """Compare the SHA-256 of every file of the folder with the manifest. Returns (passed, detail)."""
    phase = Phase(observer, CHECK, {artefact.path: artefact.size for artefact in manifest.artefacts})
    wrong = []
    for artefact in manifest.artefacts:
        step = phase.start(artefact.path)
        if hash_file(directory / artefact.path, partial(observer.advanced, step)) != artefact.sha256:
            wrong.append(artefact.path)
        phase.finish(step)
    count = counted(len(manifest.artefacts), "file")
    if wrong:
        return False, f"{len(wrong)} of {count} differ from the hash in the manifest: {_listed(wrong)}"
    return True, f"{count} checked against the hashes of the manifest"


def check_sources(manifest: Manifest, checkpoint: "Checkpoint", observer: BuildObserver) -> Verdict:
    """Compare the files of the checkpoint and of the LoRAs with the hashes in the manifest. Files that are unchanged
    since the build are not read again. The tokenizer in the folder must be a copy of the checkpoint's. Returns (passed,
    detail)."""
    identity = manifest.identity
    plain: dict[str, TensorSource] = {str(name): source for name, source in checkpoint.sources.items()}
    tokenizer = checkpoint.tokenizer
    if tokenizer is not None and tokenizer.is_dir():
        tokenizer = tokenizer / "tokenizer.json"
    groups = file_groups(plain, tokenizer, [tuple(Path(f.path) for f in lora.files) for lora in identity.loras])
    known = [*identity.files, *(file for lora in identity.loras for file in lora.files)]
    records = hash_sources(groups, plain, known, observer, lambda record: None)
    have: dict[str, tuple[str, ...]] = {}
    for record in records:
        have[record.component] = (*have.get(record.component, ()), record.sha256)
    want = dict(identity.sources)
    if identity.loras:
        want[LORA_PART] = tuple(file.sha256 for lora in identity.loras for file in lora.files)
    wrong = [part for part in want if have.get(part) != want[part]]
    copies = [artefact.sha256 for artefact in manifest.artefacts if artefact.path == TOKENIZER]
    if copies and tuple(copies) != want.get(TOKENIZER_PART):
        wrong.append(TOKENIZER)
    if wrong:
        return False, f"these differ from the files that the folder was built from: {_listed(wrong)}"
    return True, f"{', '.join(want)} are the files that the folder was built from"


def check_weights(
    manifest: Manifest,
    definitions: Mapping[str, StageDefinition],
    sources: "Mapping[str, TensorSource]",
    store: WeightStore,
    observer: BuildObserver,
) -> Verdict:
    """Compare every value of the store with a new conversion of the checkpoint. Returns (passed, detail)."""
    plan = planned_tensors(manifest.config, definitions, manifest.precision)
    touched: frozenset[str] = getattr(sources.get("dit"), "touched", frozenset())
    comparer = _Comparer(store)
    sizes = {stage: sum(tensor.nbytes for tensor in tensors.values()) for stage, tensors in plan.items()}
    phase = Phase(observer, CHECK, sizes)
    for stage, tensors in plan.items():
        step = phase.start(stage)
        weights = {"weight": (EMBEDDING_SOURCE,)} if stage == EMBEDDING else definitions[stage].weights
        comparer.inexact = {f"{stage}.{key}" for key, names in weights.items() if touched & set(names)}
        comparer.inexact |= {name.removesuffix("weight") + "scale" for name in comparer.inexact}
        source = sources[stage.partition(".")[0]]
        try:
            write_stage(comparer, stage, tensors, weights, source, manifest.precision)
        except (InputError, Scail2Error) as error:  # a missing tensor, or values out of range
            comparer.wrong[stage] = str(error)
        phase.finish(step)
    if comparer.wrong:
        listed = _listed([f"{name} ({detail})" for name, detail in comparer.wrong.items()])
        count = counted(len(comparer.wrong), "tensor")
        return False, f"{count} of the weight store differing from the checkpoint: {listed}"
    stages = counted(len(plan), "stage")
    return True, f"{comparer.values:,} values of {stages} equal the checkpoint's in {manifest.precision}"


class _Comparer:
    """Has the interface of `StoreWriter`, but compares values with the store instead of writing them.

    wrong     tensor → description of the difference
    inexact   tensors that may differ by one rounding step"""

    def __init__(self, store: WeightStore) -> None:
        self._store = store
        self.values = 0
        self.wrong: dict[str, str] = {}
        self.inexact: set[str] = set()

    def write(self, name: str, data: Tensor, start: int = 0) -> None:
        data = data.detach().reshape(-1)
        stored = self._store.get(name).reshape(-1)[start : start + data.numel()]
        self.values += data.numel()
        if stored.dtype != data.dtype or stored.numel() != data.numel():
            self.wrong[name] = f"{stored.dtype} and not {data.dtype}"
            return
        if torch.equal(stored.view(torch.uint8), data.contiguous().view(torch.uint8)):
            return
        if fault := not_numbers(stored, start):
            self.wrong[name] = fault
            return
        step = torch.finfo(data.dtype).eps if name in self.inexact else 0.0
        have, want = stored.float(), data.float()
        allowed = step * (torch.maximum(have.abs(), want.abs()) + 1e-2 * want.abs().max())
        different = ~((have - want).abs() <= allowed)  # NaN differs
        if not different.any():
            return
        first = int(different.nonzero()[0])
        how_many = counted(int(different.sum()), "value")
        text = f"{how_many}, the first at {start + first}: {have[first]:.9g}, not {want[first]:.9g}"
        self.wrong.setdefault(name, text)


def not_numbers(stored: Tensor, start: int = 0) -> str:
    """Return text about stored values that are not finite, or "" if all are finite. start: index of the first value."""
    lost = (~stored.float().isfinite()).nonzero()
    return f"{counted(len(lost), 'NaN or infinite value')}, the first at {start + int(lost[0])}" if len(lost) else ""


def check_tables(directory: Path, manifest: Manifest, source: "TensorSource | None") -> Verdict:
    """Compare the tables of the runtime with the checkpoint. Returns (passed, detail)."""
    have = load_file(directory / TABLES)
    try:
        want = runtime_tables(manifest.config, source)
    except InputError as error:
        return False, str(error)
    touched = bool(getattr(source, "touched", ()))
    names = sorted(have.keys() | want.keys())
    lost = [f"{n} ({fault})" for n in names if n in have and (fault := not_numbers(have[n].reshape(-1)))]
    if lost:
        return False, f"{len(lost)} of {len(names)} tables hold NaN or infinite values: {_listed(lost)}"
    wrong = [n for n in names if n not in have or n not in want or not _same(have[n], want[n], 1e-5 * touched)]
    if wrong:
        return False, f"{len(wrong)} of {counted(len(names), 'table')} differ from the checkpoint: {_listed(wrong)}"
    return True, f"{counted(len(names), 'table')} equal the checkpoint's"


def _same(have: Tensor, want: Tensor, tolerance: float) -> bool:
    return have.shape == want.shape and torch.allclose(have.float(), want.float(), rtol=tolerance, atol=tolerance / 10)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
