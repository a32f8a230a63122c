"""Fit of a LoRA file and a transformer: checks it module by module and collects the updates, or the problems.

A module is applied completely or not at all: pair, alpha, magnitude and bias difference belong together. One module may
always be left out: a `patch_embedding` for other inputs, which occurs in distilled LoRAs of image-to-video models. If
no matrix of a file's blocks fits, it was made for a model of another width, and no option applies it.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from scail2_rt.export.checkpoint.lora_foreign import network_of, width_name
from scail2_rt.export.checkpoint.lora_kinds import (
    Change,
    Difference,
    Kronecker,
    LowRank,
    Product,
    Replacement,
    Rows,
    Scaled,
    magnitude_by_row,
    product_of,
)
from scail2_rt.export.checkpoint.lora_names import CHANGES_BY_ITSELF, Kind, ModuleTensors
from scail2_rt.export.checkpoint.lora_scale import Training
from scail2_rt.export.checkpoint.tensors import TensorSource

_LISTED = 8
_FOR_INPUTS = "patch_embedding"  # the only module whose columns are a model's inputs
_QUERY = "blocks.0.self_attn.q.weight"
_REPLACEMENTS: tuple[tuple[Kind, str], ...] = (("new weight", "weight"), ("new bias", "bias"))
_DIFFERENCES: tuple[tuple[Kind, str], ...] = (("weight", "weight"), ("bias", "bias"), ("modulation", "modulation"))


class Misfit(Exception):
    """Tensors that do not fit the transformer, and the reason."""

    def __init__(self, names: Sequence[str], reason: str) -> None:
        super().__init__(reason)
        self.names, self.reason = tuple(names), reason


@dataclass(frozen=True, slots=True)
class Update:
    """A change of one Wan tensor with its strength; `rows`: this tensor's rows of a change for a fused module."""

    change: Change
    strength: float
    rows: Rows = None

    def add_to(self, weight: Tensor) -> None:
        """Add the change to an fp32 tensor in place."""
        self.change.apply(weight, self.strength, self.rows)


@dataclass(slots=True)
class Fusion:
    """Checks one LoRA file against the transformer and collects its updates, or the problems that prevent them."""

    lora: TensorSource
    base: TensorSource
    strength: float
    known: frozenset[str]  # tensors of the transformer
    training: Training
    updates: dict[str, list[Update]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)  # LoRA tensor → why it cannot be applied
    left_out: list[str] = field(default_factory=list)
    origins: dict[str, None] = field(default_factory=dict)  # origins of the alphas
    applied: int = 0
    widths: Counter[tuple[int, int]] = field(default_factory=Counter)  # of pairs in blocks that do not fit
    fitting: int = 0  # number of block modules that fit

    @property
    def other_width(self) -> bool:
        """Whether the file was made for a model of another width: no matrix of its blocks fits."""
        return bool(self.widths) and not self.fitting

    def read(self, groups: Sequence[ModuleTensors], unknown: Sequence[str]) -> None:
        self.problems |= dict.fromkeys(unknown, "unknown tensor")
        self._refuse_overlaps(groups)
        for group in groups:
            self._module(group)

    def refusal(self, path: Path) -> str:
        """Return why the file as a whole is not applied. An option is named only if it helps."""
        if self.other_width:
            (outputs, inputs), _ = self.widths.most_common(1)[0]
            width = self.base.shape(_QUERY)[0] if _QUERY in self.known else 0
            own = f"; this transformer has {width_name(width)}" if width else ""
            made = width_name(inputs if inputs != width else outputs)
            return (
                f"The LoRA {path} was made for another model, of {made}{own}: no matrix of its blocks fits. Use a LoRA "
                "for this model."
            )
        if not self.applied:
            network = network_of(self.problems) if not self.updates else None
            what = f"; it seems to be for {network}" if network else ""
            listed = _listed(self.problems) or "; ".join(self.left_out)
            return f"{path} has no tensor that fits this transformer{what}: {listed}"
        return (
            f"The LoRA {path} is refused: {len(self.problems)} of its tensors cannot be applied: "
            f"{_listed(self.problems)}. To apply the modules that fit, use --lora-partial."
        )

    def _refuse_overlaps(self, groups: Sequence[ModuleTensors]) -> None:
        """Report a fused tensor and a separate tensor of one of its parts: both would apply the same change."""
        single = {group.modules[0]: group for group in groups if len(group.modules) == 1}
        for fused in [group for group in groups if len(group.modules) > 1]:
            for other in [single[module] for module in fused.modules if module in single]:
                for kind in set(other.tensors) & set(fused.tensors):
                    other.strays[other.tensors[kind]] = f"also part of {fused.tensors[kind]}"
                    fused.strays[fused.tensors[kind]] = f"overlaps {other.tensors[kind]}"

    def _module(self, group: ModuleTensors) -> None:
        """Collect all changes of a module, or none."""
        faults = dict(group.strays)
        for kind, name in group.tensors.items():
            if name not in faults and (reason := self._unusable(kind, name)):
                faults[name] = reason
        changes: list[tuple[str, Change]] = []
        if not faults:
            product = product_of(group, self.lora)
            if self._leave_out_patch_embedding(group, product):
                return
            if isinstance(product, str):
                faults = dict.fromkeys(_product_names(group), product)
            else:
                try:
                    changes = self._changes(group, product)
                except Misfit as misfit:
                    faults = dict.fromkeys(misfit.names, misfit.reason)
        if faults:
            rest = [name for name in group.names if name not in faults]
            self.problems |= faults | dict.fromkeys(rest, f"belongs to {', '.join(faults)}")
            return
        for parameter, change in changes:
            self._add(group.modules, parameter, change)
        self.applied += len(group.names)

    def _unusable(self, kind: Kind, name: str) -> str | None:
        """Return why a tensor's values cannot be used (integers, not finite); None if they can. Alpha may be an
        integer."""
        if not self.lora.dtype(name).is_floating_point and kind != "alpha":
            return f"type {self.lora.dtype(name)}"
        tensor = self.lora.get(name)
        return None if bool(torch.isfinite(tensor.float()).all()) else "not finite"

    def _leave_out_patch_embedding(self, group: ModuleTensors, product: Product | str | None) -> bool:
        """Leave out a patch embedding for other inputs, and note it; return whether this was done."""
        target = f"{_FOR_INPUTS}.weight"
        if group.modules != (_FOR_INPUTS,) or target not in self.known:
            return False
        rows, channels, *window = self.base.shape(target)
        name = group.tensors.get("weight", group.tensors.get("new weight"))
        if isinstance(product, Product):
            made = product.rows_columns
        elif name is not None and len(shape := self.lora.shape(name)) > 1:
            made = (shape[0], math.prod(shape[1:]))
        else:
            return False
        theirs, rest = divmod(made[1], math.prod(window))
        if made[0] != rows or made[1] == channels * math.prod(window):
            return False
        inputs = f"{theirs} channels" if not rest else f"{made[1]} inputs"
        self.left_out.append(f"{_FOR_INPUTS} is left out: it is for {inputs}, this transformer has {channels}")
        return True

    def _changes(self, group: ModuleTensors, product: Product | None) -> list[tuple[str, Change]]:
        """Return (parameter, change) of everything in a module. Raises Misfit if something does not fit."""
        changes: list[tuple[str, Change]] = []
        for kind, parameter in _REPLACEMENTS:
            if name := group.tensors.get(kind):
                self._check_shape(group.modules, parameter, name)
                changes.append((parameter, Replacement(self.lora, name)))
        if product is not None:
            changes += self._scaled(group, product)
        for kind, parameter in _DIFFERENCES:
            if name := group.tensors.get(kind):
                self._check_shape(group.modules, parameter, name)
                changes.append((parameter, Difference(self.lora, name)))
        return changes

    def _scaled(self, group: ModuleTensors, product: Product) -> list[tuple[str, Change]]:
        names = _product_names(group)
        targets = [f"{module}.weight" for module in group.modules]
        if not self.known.issuperset(targets):
            raise Misfit(names, f"{targets[0]} is not in this transformer")
        shapes = [self.base.shape(target) for target in targets]
        stacked = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        in_block = group.modules[0].startswith("blocks.")
        if product.rows_columns != (stacked[0], math.prod(stacked[1:])) or len(stacked) < 2:
            if in_block:
                self.widths[product.rows_columns] += 1
            raise Misfit(names, f"{_described(product)} do not give {list(shapes[0])}{_times(shapes)}")
        self.fitting += in_block
        own, magnitude = group.tensors.get("alpha"), group.tensors.get("magnitude")
        if own is not None and math.prod(self.lora.shape(own)) != 1:
            raise Misfit(names, f"alpha of shape {list(self.lora.shape(own))} instead of one number")
        scale = self.training.scale(
            group.module, product.rank, None if own is None else float(self.lora.get(own).reshape(()))
        )
        self.origins[scale.origin] = None
        by_row: bool | None = True
        if magnitude is not None:
            shape = self.lora.shape(magnitude)
            by_row = magnitude_by_row(magnitude, shape, stacked)
            if by_row is None or (not by_row and len(targets) > 1):
                raise Misfit((magnitude,), f"shape {list(shape)} is not a magnitude for {list(stacked)}")
        elif self.training.dora:
            raise Misfit(names, "DoRA without a magnitude")
        changes: list[tuple[str, Change]] = [
            ("weight", Scaled(product, scale.value, self.lora, magnitude, bool(by_row)))
        ]
        if (bias := group.tensors.get("up bias")) is not None:
            self._check_shape(group.modules, "bias", bias)
            changes.append(("bias", Difference(self.lora, bias, scale.value)))
        return changes

    def _check_shape(self, modules: Sequence[str], parameter: str, name: str) -> None:
        targets = self._parameters(modules, parameter)
        if not self.known.issuperset(targets):
            raise Misfit((name,), f"{targets[0]} is not in this transformer")
        first = self.base.shape(targets[0])
        wanted = (len(targets) * first[0], *first[1:])
        if self.lora.shape(name) != wanted:
            raise Misfit((name,), f"shape {list(self.lora.shape(name))} instead of {list(wanted)}")

    def _parameters(self, modules: Sequence[str], parameter: str) -> list[str]:
        """Return the names of the target tensors; a parameter without a module (modulation) has no `.weight`."""
        named = [f"{module}.{parameter}" for module in modules]
        if parameter == "weight":
            named = [name if name in self.known else name.removesuffix(".weight") for name in named]
        return named

    def _add(self, modules: Sequence[str], parameter: str, change: Change) -> None:
        targets = self._parameters(modules, parameter)
        rows = self.base.shape(targets[0])[0]
        for i, target in enumerate(targets):
            cut = (i * rows, (i + 1) * rows) if len(targets) > 1 else None
            self.updates.setdefault(target, []).append(Update(change, self.strength, cut))


def _product_names(group: ModuleTensors) -> tuple[str, ...]:
    """Return the tensors of a module that make its product, and those that belong to it."""
    return tuple(name for kind, name in group.tensors.items() if kind not in CHANGES_BY_ITSELF)


def _described(product: Product) -> str:
    if isinstance(product, LowRank):
        return f"up {list(product.lora.shape(product.up))} and down {list(product.lora.shape(product.down))}"
    return f"the {'LoKr' if isinstance(product, Kronecker) else 'LoHa'} factors of {list(product.rows_columns)}"


def _times(shapes: Sequence[tuple[int, ...]]) -> str:
    return f" x {len(shapes)}" if len(shapes) > 1 else ""


def _listed(problems: Mapping[str, str]) -> str:
    listed = "; ".join(f"{name} ({reason})" for name, reason in list(problems.items())[:_LISTED])
    return listed + (f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else "")
