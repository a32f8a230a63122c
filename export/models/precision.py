"""Types of each component under each precision flag (the table in docs/engines.md).

A `Numerics` gives the storage type of a stage's weights and the type it computes in. They may differ: ONNX Runtime on a
CPU has no bf16 GEMM, so a bf16 or fp8 stage runs there in fp32 arithmetic on the same stored values. The residual
stream, norms, modulation, RoPE, the time embedding and the head are always fp32.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

Precision = Literal["fp32", "bf16", "fp16", "fp8"]
Component = Literal["dit", "vae", "umt5", "clip"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True, slots=True)
class Numerics:
    """Storage type of weights, type of GEMM operands and of activations between stages, and whether the stage's
    large linears are e4m3 with one weight scale per output channel and one activation scale per row."""

    storage: torch.dtype = torch.float32
    compute: torch.dtype = torch.float32
    fp8: bool = False

    def in_arithmetic(self, compute: torch.dtype) -> "Numerics":
        """Return the same storage, with arithmetic in another type."""
        return Numerics(self.storage, compute, self.fp8)


# Accumulation of the e4m3 GEMM of each fp8 linear on a GPU: "fast" sums in the tensor core, "accurate" adds the partial
# sum to fp32 registers every few steps. GELU outputs share an offset: over the feed-forward's 13,824 addends the fast
# sum has an error of 0.033; over 5,120 normed ones the error is hidden by the rounding of the operands (0.0375).
Accumulation = Literal["fast", "accurate"]
FP8_ACCUMULATION: dict[str, Accumulation] = {
    "qkv.linear": "fast",
    "mid.o": "fast",
    "mid.q": "fast",
    "ffn.o": "fast",
    "ffn.up": "fast",
    "ffn.down": "accurate",
}

FP32 = Numerics()
BF16 = Numerics(torch.bfloat16, torch.bfloat16)
FP16 = Numerics(torch.float16, torch.float16)

_REST_OF_DIT = {"fp32": FP32, "bf16": BF16, "fp16": FP16, "fp8": BF16}
_COMPONENTS: dict[str, dict[str, Numerics]] = {
    "vae": {"fp32": FP32, "bf16": FP16, "fp16": FP16, "fp8": FP16},
    "clip": {"fp32": FP32, "bf16": FP16, "fp16": FP16, "fp8": FP16},
    "umt5": {"fp32": FP32, "bf16": BF16, "fp16": BF16, "fp8": BF16},  # fp16 overflows in umT5
}


def numerics_of(stage: str, precision: Precision) -> Numerics:
    """Return the types of the stage `stage` (`dit.blocks.7.ffn`, `vae.decode_step`, ...) under a precision flag."""
    component, _, rest = stage.partition(".")
    if component != "dit":
        return _COMPONENTS[component][precision]
    if rest in ("time", "head"):
        return FP32
    if precision == "fp8" and rest.rpartition(".")[2] in ("qkv", "mid", "ffn"):
        return Numerics(torch.bfloat16, torch.bfloat16, fp8=True)
    return _REST_OF_DIT[precision]
