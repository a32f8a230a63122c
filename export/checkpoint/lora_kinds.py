"""Effects of a LoRA's tensors on a weight: low-rank pairs, Kronecker and Hadamard products, magnitudes, differences.

Every change is added to an fp32 tensor in place, one module at a time. A product P with scale s gives W +
strength·s·P. With a magnitude m (DoRA) the trained weight is m·V/‖V‖, V = W + s·P, with the norm over each output row
or each input column; strength interpolates linearly from W to it.
Sources: LoRA (Hu 2021), LyCORIS (Yeh 2023; `lycoris/functional`), DoRA (Liu 2024; PEFT `tuners/lora/dora.py`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from scail2_rt.export.checkpoint.lora_names import Kind, ModuleTensors
from scail2_rt.export.checkpoint.tensors import TensorSource

Rows = tuple[int, int] | None  # this tensor's rows of a change for a fused module
_TUCKER = "i j ..., i p, j r -> p r ..."
_EPS = torch.finfo(torch.float32).eps


class Change(Protocol):
    """A change of one tensor."""

    def apply(self, weight: Tensor, strength: float, rows: Rows) -> None:
        """Change an fp32 weight in place. rows: those of a fused module that belong to this weight; None for all."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """up·down; in a convolution, optionally with a core between them (`mid` [rank, rank, window...])."""

    lora: TensorSource
    up: str
    down: str
    mid: str | None = None

    @property
    def rank(self) -> int:
        """The number that alpha is divided by."""
        return self.lora.shape(self.down)[0]

    @property
    def rows_columns(self) -> tuple[int, int]:
        """(rows, columns) of the change; for a convolution, columns are channels times the size of the window."""
        window = math.prod(self.lora.shape(self.mid)[2:]) if self.mid else 1
        return self.lora.shape(self.up)[0], math.prod(self.lora.shape(self.down)[1:]) * window

    @property
    def fault(self) -> str | None:
        """Why the shapes do not go together; None if they do."""
        up, down = self.lora.shape(self.up), self.lora.shape(self.down)
        core = self.lora.shape(self.mid) if self.mid else (0, 0)
        fits = len(up) >= 2 and len(down) >= 2 and up[1] == down[0] > 0 and all(n == 1 for n in up[2:])
        if fits and (not self.mid or core[:2] == (down[0], down[0])):
            return None
        return f"up {list(up)} and down {list(down)} do not go together"

    def add_to(self, weight: Tensor, scale: float, rows: Rows) -> None:
        up, down = _rows(self.lora.get(self.up), rows).float().flatten(1), self.lora.get(self.down).float().flatten(1)
        if self.mid:
            core = torch.einsum(_TUCKER, self.lora.get(self.mid).float(), up.T, down)
            weight.add_(core.reshape(weight.shape), alpha=scale)
        else:
            weight.flatten(1).addmm_(up, down, alpha=scale)


@dataclass(frozen=True, slots=True)
class Kronecker:
    """first ⊗ second (LoKr); each is one tensor or the product of two. core: between the two factors of `second`."""

    lora: TensorSource
    first: tuple[str, ...]
    second: tuple[str, ...]
    core: str | None = None

    @property
    def rank(self) -> int | None:
        for names in (self.second, self.first):
            if len(names) == 2:
                return self.lora.shape(names[1])[0]
        return None

    @property
    def rows_columns(self) -> tuple[int, int]:
        (a, b), (c, d) = self._shape(self.first), self._shape(self.second, self.core)
        return a * c, b * d

    @property
    def fault(self) -> str | None:
        shapes = [self.lora.shape(name) for name in (*self.first, *self.second)]
        if any(len(shape) < 2 for shape in shapes) or not all(
            _multiply(self.lora, names, core) for names, core in ((self.first, None), (self.second, self.core))
        ):
            return f"{', '.join(map(str, map(list, shapes)))} do not go together"
        return None

    def _shape(self, names: tuple[str, ...], core: str | None = None) -> tuple[int, int]:
        left, right = self.lora.shape(names[0]), self.lora.shape(names[-1])
        if core:
            return left[1], right[1] * math.prod(self.lora.shape(core)[2:])
        return left[0], math.prod(right[1:])

    def add_to(self, weight: Tensor, scale: float, rows: Rows) -> None:
        first, second = _factor(self.lora, self.first), _factor(self.lora, self.second, self.core)
        weight.add_(_rows(torch.kron(first, second), rows).reshape(weight.shape), alpha=scale)


@dataclass(frozen=True, slots=True)
class Hadamard:
    """(w1_a·w1_b) ⊙ (w2_a·w2_b) (LoHa); in a convolution, optionally with a core in each product."""

    lora: TensorSource
    first: tuple[str, str]
    second: tuple[str, str]
    cores: tuple[str, str] | None = None

    @property
    def rank(self) -> int:
        return self.lora.shape(self.first[1])[0]

    @property
    def rows_columns(self) -> tuple[int, int]:
        left, right = (self.lora.shape(name) for name in self.first)
        if self.cores:
            return left[1], right[1] * math.prod(self.lora.shape(self.cores[0])[2:])
        return left[0], math.prod(right[1:])

    @property
    def fault(self) -> str | None:
        first, second = self.cores or (None, None)
        shapes = [self.lora.shape(name) for name in (*self.first, *self.second)]
        alike = shapes[0][:1] == shapes[2][:1] and shapes[1][1:] == shapes[3][1:]
        if not self.cores and not alike:
            return f"{', '.join(map(str, map(list, shapes)))} do not go together"
        if not (_multiply(self.lora, self.first, first) and _multiply(self.lora, self.second, second)):
            return f"{', '.join(map(str, map(list, shapes)))} do not go together"
        return None

    def add_to(self, weight: Tensor, scale: float, rows: Rows) -> None:
        first, second = self.cores or (None, None)
        product = _factor(self.lora, self.first, first, rows).mul_(_factor(self.lora, self.second, second, rows))
        weight.add_(product.reshape(weight.shape), alpha=scale)


Product = LowRank | Kronecker | Hadamard  # `rows_columns`: rows and columns (in a convolution: channels times window)


@dataclass(frozen=True, slots=True)
class Scaled:
    """A product with its scale, and optionally a magnitude per output row (`by_row`) or per input column."""

    product: Product
    scale: float
    lora: TensorSource
    magnitude: str | None = None
    by_row: bool = True

    def apply(self, weight: Tensor, strength: float, rows: Rows) -> None:
        if self.magnitude is None:
            self.product.add_to(weight, _fp32(strength * self.scale), rows)
            return
        trained = weight.clone()
        self.product.add_to(trained, _fp32(self.scale), rows)
        magnitude = self.lora.get(self.magnitude).float().flatten()
        if self.by_row:
            factors = _rows(magnitude, rows) / (trained.flatten(1).norm(dim=1) + _EPS)
            trained.mul_(factors.view(-1, *[1] * (weight.dim() - 1)))
        else:
            norms = trained.transpose(0, 1).flatten(1).norm(dim=1) + _EPS
            trained.mul_((magnitude / norms).view(1, -1, *[1] * (weight.dim() - 2)))
        weight.lerp_(trained, _fp32(strength))


@dataclass(frozen=True, slots=True)
class Difference:
    """A tensor that is added to the weight."""

    lora: TensorSource
    name: str
    scale: float = 1.0

    def apply(self, weight: Tensor, strength: float, rows: Rows) -> None:
        weight.add_(
            _rows(self.lora.get(self.name), rows).float().reshape(weight.shape), alpha=_fp32(strength * self.scale)
        )


@dataclass(frozen=True, slots=True)
class Replacement:
    """A tensor that replaces the checkpoint's; strength interpolates linearly towards it."""

    lora: TensorSource
    name: str

    def apply(self, weight: Tensor, strength: float, rows: Rows) -> None:
        weight.lerp_(_rows(self.lora.get(self.name), rows).float().reshape(weight.shape), _fp32(strength))


def product_of(group: ModuleTensors, lora: TensorSource) -> Product | str | None:
    """Return the product of a module's tensors; None if there is none; a reason (str) if it is invalid."""
    have = group.tensors
    families = {kind.partition(" ")[0] for kind in have} & {"down", "up", "lokr", "loha", "mid"}
    if not families:
        loose: tuple[Kind, ...] = ("alpha", "magnitude", "up bias")
        return "no matching up" if any(kind in have for kind in loose) else None
    if len({"pair" if family in ("down", "up", "mid") else family for family in families}) > 1:
        return f"{', '.join(sorted(families))} in one module"
    if "loha" in families:
        if missing := [part for part in ("w1_a", "w1_b", "w2_a", "w2_b") if f"loha {part}" not in have]:
            return f"no matching hada_{missing[0]}"
        cores = (have["loha t1"], have["loha t2"]) if "loha t1" in have and "loha t2" in have else None
        if cores is None and ("loha t1" in have or "loha t2" in have):
            return "hada_t1 without hada_t2"
        hadamard = Hadamard(lora, (have["loha w1_a"], have["loha w1_b"]), (have["loha w2_a"], have["loha w2_b"]), cores)
        return hadamard.fault or hadamard
    if "lokr" in families:
        return _kronecker(have, lora)
    if "up" not in have or "down" not in have:
        return "no matching up" if "up" not in have else "no matching down"
    pair = LowRank(lora, have["up"], have["down"], have.get("mid"))
    return pair.fault or pair


def _kronecker(have: dict[Kind, str], lora: TensorSource) -> "Kronecker | str":
    factors: list[tuple[str, ...]] = []
    whole: tuple[Kind, Kind] = ("lokr w1", "lokr w2")
    halves: tuple[tuple[Kind, Kind], ...] = (("lokr w1_a", "lokr w1_b"), ("lokr w2_a", "lokr w2_b"))
    for one, (a, b) in zip(whole, halves, strict=True):
        if one in have and (a in have or b in have):
            return f"{one[5:]} both complete and in parts"
        if one not in have and not (a in have and b in have):
            return f"no matching lokr_{one[5:]}"
        factors.append((have[one],) if one in have else (have[a], have[b]))
    core = have.get("lokr t2")
    if core and len(factors[1]) == 1:
        return "lokr_t2 beside a complete lokr_w2"
    product = Kronecker(lora, factors[0], factors[1], core)
    return product.fault or product


def magnitude_by_row(name: str, shape: tuple[int, ...], weight: tuple[int, ...]) -> bool | None:
    """Return whether a magnitude has one number per output row, or (False) per input column; None if it fits neither.

    PEFT's are per row. If both fit, the shape decides: [1, n] is per column, as written by LyCORIS."""
    count, outputs, inputs = math.prod(shape), weight[0], weight[1] if len(weight) > 1 else 0
    by_column = len(shape) > 1 and shape[0] == 1 and count == inputs and "lora_magnitude_vector" not in name
    if count == outputs and not (by_column and shape[0] != outputs):
        return True
    return False if count == inputs else None


def _multiply(lora: TensorSource, names: Sequence[str], core: str | None) -> bool:
    """Return whether the factors of one matrix can be multiplied."""
    if len(names) == 1:
        return True
    left, right = (lora.shape(name) for name in names)
    if len(left) < 2 or len(right) < 2:
        return False
    if core:
        return lora.shape(core)[:2] == (left[0], right[0]) and len(left) == len(right) == 2
    return len(left) == 2 and left[1] == right[0]


def _factor(lora: TensorSource, names: Sequence[str], core: str | None = None, rows: Rows = None) -> Tensor:
    """Compute one matrix [rows, columns] from its one or two tensors."""
    if len(names) == 1:
        return lora.get(names[0]).float().flatten(1)
    left, right = (lora.get(name).float() for name in names)
    if core:
        return _rows(torch.einsum(_TUCKER, lora.get(core).float(), left, right).flatten(1), rows)
    return _rows(left, rows) @ right.flatten(1)


def _rows(tensor: Tensor, rows: Rows) -> Tensor:
    return tensor if rows is None else tensor[rows[0] : rows[1]]


def _fp32(factor: float) -> float:
    """Round a factor to fp32: one that is too large becomes infinite, and the result is then reported as not finite."""
    return float(torch.tensor(factor, dtype=torch.float32))
