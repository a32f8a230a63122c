"""Attention variants: which self-attention runs, chosen once at start, and the reason in words.

`auto` takes the fastest variant whose accuracy matches the precision; a variant named by the user is used or refused.
Lossy variants (8-bit) are used with the fp8 precision or by name, never otherwise. `8bit` and `bf16` (16-bit, bf16 or
fp16) each have two kernels for the same operands: the sm90 kernel where it runs, else the Triton kernel. `8bit-triton`
always uses Triton.
"""

from dataclasses import dataclass
from importlib.util import find_spec

import torch

from scail2_rt.kernels.errors import InputError
from scail2_rt.kernels.rows.ops import E4M3

WIDTHS = (64, 128)  # head widths that our kernels support


@dataclass(frozen=True, slots=True)
class AttentionVariant:
    """One way to compute self-attention: its operands and its requirements.

    name     on the command line and in reports; description: in words
    qk       type of the prepared q and k; None: the type of the stages
    v        type of the prepared v; None: as projected, left in place
    sm90     a second kernel for the same operands exists for sm90 and is preferred there
    lowest   minimum compute capability; None: any device
    widths   supported head widths, () for any; package: required Python package, None for none"""

    name: str
    description: str
    qk: torch.dtype | None = None
    v: torch.dtype | None = None
    sm90: bool = False
    lowest: tuple[int, int] | None = (8, 0)
    widths: tuple[int, ...] = ()
    package: str | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def eight_bit(self) -> bool:
        """Whether q and k are quantised. Such a variant is lossy; on a CPU a PyTorch twin computes it."""
        return self.qk is not None

    def operand_type(self, precision: str) -> torch.dtype:
        """Return the type of q and k that a kernel on a GPU reads. precision: fp32, bf16, fp16 or fp8."""
        return self.qk or (torch.float16 if precision == "fp16" else torch.bfloat16)

    def prepared_bytes(self, element: int) -> int:
        """Return the bytes per channel of one token added by preparation to the projected q k v (`element` bytes each).

        They hold q and k, and v or, where v stays in place, the attention's output."""
        return 2 * _size(self.qk, element) + _size(self.v, element)


def _size(dtype: torch.dtype | None, element: int) -> int:
    return element if dtype is None else dtype.itemsize


EIGHT_BIT = AttentionVariant(
    *("8bit", "int8 QK, fp8 PV with two-level accumulation", torch.int8, E4M3),
    sm90=True,
    lowest=(8, 9),
    widths=WIDTHS,
    package="triton",  # the preparation always uses Triton
)
EIGHT_BIT_TRITON = AttentionVariant(
    *("8bit-triton", "int8 QK, fp8 PV with two-level accumulation (Triton)", torch.int8, E4M3),
    lowest=(8, 9),
    widths=WIDTHS,
    package="triton",
)
EIGHT_BIT_16BIT_PV = AttentionVariant(
    "8bit-bf16pv", "int8 QK, 16-bit PV (Triton)", torch.int8, widths=WIDTHS, package="triton"
)
SIXTEEN_BIT = AttentionVariant("bf16", "16-bit, ours", sm90=True, widths=WIDTHS, package="triton")
CUDNN = AttentionVariant("cudnn", "16-bit, cuDNN through PyTorch")
FLASH = AttentionVariant("flash", "16-bit, the flash-attn package", package="flash_attn")
SAGE = AttentionVariant("sage", "8-bit QK, the sageattention package", package="sageattention")
SDPA = AttentionVariant("sdpa", "PyTorch's own choice", lowest=None)
NO_ATTENTION = AttentionVariant("none", "there is no transformer", lowest=None)  # for a folder without a transformer

VARIANTS = {
    variant.name: variant
    for variant in (EIGHT_BIT, EIGHT_BIT_TRITON, EIGHT_BIT_16BIT_PV, SIXTEEN_BIT, CUDNN, FLASH, SAGE, SDPA)
}
# major capability → auto's choice for bf16 and fp16, as measured; ours only where its sm90 kernel runs, else cuDNN
FASTEST_16_BIT = {9: SIXTEEN_BIT, 10: CUDNN}


def usual_attention(precision: str) -> AttentionVariant:
    """Return auto's choice on a GPU that supports the precision, for estimates without a device."""
    return EIGHT_BIT if precision == "fp8" else SDPA


def is_eight_bit(requested: str) -> bool:
    """Return whether `requested` names an 8-bit variant. False for "auto", which follows the precision."""
    return requested in VARIANTS and VARIANTS[requested].eight_bit


def choose_attention(
    requested: str, precision: str, device: torch.device | str, head_dim: int
) -> tuple[AttentionVariant, str]:
    """Return (variant, reason). requested: "auto" or a key of VARIANTS; precision: fp32, bf16, fp16 or fp8.

    Raises InputError if the named variant is unknown or cannot run on this device."""
    device = torch.device(device)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if requested != "auto":
        if requested not in VARIANTS:
            raise InputError(f"unknown attention {requested!r}; choose auto, {', '.join(VARIANTS)}")
        named = VARIANTS[requested]
        problem = obstacle(named, precision, capability, head_dim)
        if problem:
            raise InputError(f"attention {requested!r} cannot run: {problem}; choose another or auto")
        return named, f"{_description(named, device, head_dim, precision)}, as requested"
    if capability is None:
        return SDPA, f"{SDPA.description}: the device is {device.type}"
    name, instead = f"sm{capability[0]}{capability[1]}", ""
    if precision == "fp8":
        problem = obstacle(EIGHT_BIT, precision, capability, head_dim)
        if problem is None:
            return EIGHT_BIT, f"{_description(EIGHT_BIT, device, head_dim, precision)}: precision fp8 on {name}"
        instead = f"; {EIGHT_BIT} cannot run: {problem}"
    variant = FASTEST_16_BIT.get(capability[0]) if precision != "fp32" else None
    if variant is not None and variant.sm90:
        problem = obstacle(variant, precision, capability, head_dim)
        problem = problem or hopper_obstacle(device, head_dim, variant.operand_type(precision))
        if problem is not None:
            instead = f"{instead}; {variant} cannot run in its sm90 CUDA kernel: {problem}"
            variant = CUDNN
    if variant is not None:
        described = _description(variant, device, head_dim, precision)
        return variant, f"{described}: the fastest 16-bit one that runs on {name}{instead}"
    return SDPA, f"{SDPA.description}: precision {precision} on {name}{instead}"


def _description(variant: AttentionVariant, device: torch.device, head_dim: int, precision: str) -> str:
    """Describe `variant`; on a GPU, if it has two kernels, add which of them runs and why."""
    if not variant.sm90 or device.type != "cuda":
        return variant.description
    problem = hopper_obstacle(device, head_dim, variant.operand_type(precision))
    kernel = "the sm90 CUDA kernel" if problem is None else f"Triton, not the sm90 CUDA kernel: {problem}"
    return f"{variant.description} ({kernel})"


def hopper_obstacle(device: torch.device, head_dim: int, operands: torch.dtype) -> str | None:
    """Return why the sm90 kernel for int8, bf16 or fp16 q and k cannot run on this GPU, or None if it can.

    The first call may compile and load it: `choose_attention` makes that call, so that it never happens during the
    capture of a CUDA graph."""
    from scail2_rt.kernels.attention import hopper_attention, hopper_attention_16bit

    if head_dim != hopper_attention.WIDTH:
        return f"its heads are {hopper_attention.WIDTH} wide, here they are {head_dim}"
    with torch.cuda.device(device):
        if operands == torch.int8:
            return hopper_attention.available()
        return hopper_attention_16bit.available(operands)


def obstacle(
    variant: AttentionVariant, precision: str, capability: tuple[int, int] | None, head_dim: int
) -> str | None:
    """Return why `variant` cannot run on a GPU of this capability (None: a CPU), or None if it can."""
    if variant.lowest is None or (variant.eight_bit and capability is None):
        return None  # the twins of the 8-bit variants run on any device
    if capability is None:
        return "it needs an NVIDIA GPU and the device is a CPU"
    if precision == "fp32" and not variant.eight_bit:
        return "it computes in 16 bit and the precision is fp32"
    if capability < variant.lowest:
        needed, found = variant.lowest, capability
        return f"it needs a GPU of capability {needed[0]}.{needed[1]}, this one has {found[0]}.{found[1]}"
    if variant.widths and head_dim not in variant.widths:
        return f"its heads must be {' or '.join(map(str, variant.widths))} wide, here they are {head_dim}"
    if variant.package is not None and find_spec(variant.package) is None:
        return f"the package {variant.package} is not installed"
    return None
