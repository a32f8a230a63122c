"""Which self-attention runs: chosen once, at start, with the reason in words.

`auto` takes the fastest one whose accuracy the precision asks for; a variant the user named is used or refused. Lossy
ones (those of 8 bit) come with the fp8 precision or by name, never otherwise. `8bit` and `bf16` (16 bit, bf16 or fp16)
are two kernels each for the same operands: the one written for sm90 where that runs, else the Triton one; `8bit-triton`
is always the latter.
"""

from dataclasses import dataclass
from importlib.util import find_spec

import torch

from scail2_rt.kernels.errors import InputError
from scail2_rt.kernels.rows.ops import E4M3

WIDTHS = (64, 128)  # of the heads that our kernels take


@dataclass(frozen=True, slots=True)
class AttentionVariant:
    """One way to compute self-attention: what it is, what is prepared for it and what it needs.

    name     on the command line and in reports; description: in words
    qk       type of q and k as prepared; None: that of the stages
    v        type of v as prepared; None: as it was projected, so that it stays where it is
    sm90     there is a second kernel for the same operands, which runs on sm90 where it can
    lowest   compute capability that it needs; None: it runs on every device
    widths   head widths that it takes, () for any; package: what must be installed, None for nothing"""

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
        """Are q and k quantised? Lossy, and on a CPU computed by a twin in PyTorch."""
        return self.qk is not None

    def operand_type(self, precision: str) -> torch.dtype:
        """Of q and k as a kernel on a GPU reads them."""
        return self.qk or (torch.float16 if precision == "fp16" else torch.bfloat16)

    def prepared_bytes(self, element: int) -> int:
        """Bytes a channel of one token beside q k v as projected, with `element` bytes a value there: q and k, and v
        or, where v stays in place, the attention's output."""
        return 2 * _size(self.qk, element) + _size(self.v, element)


def _size(dtype: torch.dtype | None, element: int) -> int:
    return element if dtype is None else dtype.itemsize


EIGHT_BIT = AttentionVariant(
    *("8bit", "int8 QK, fp8 PV with two-level accumulation", torch.int8, E4M3),
    sm90=True,
    lowest=(8, 9),
    widths=WIDTHS,
    package="triton",  # its preparation is Triton's always
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
NO_ATTENTION = AttentionVariant("none", "there is no transformer", lowest=None)  # of a folder without one

VARIANTS = {
    variant.name: variant
    for variant in (EIGHT_BIT, EIGHT_BIT_TRITON, EIGHT_BIT_16BIT_PV, SIXTEEN_BIT, CUDNN, FLASH, SAGE, SDPA)
}
# major capability → what auto takes for bf16 and fp16, as measured; ours only where its sm90 kernel runs, else cuDNN
FASTEST_16_BIT = {9: SIXTEEN_BIT, 10: CUDNN}


def usual_attention(precision: str) -> AttentionVariant:
    """What auto takes on a GPU that has what the precision asks for: for estimates, where no device is asked."""
    return EIGHT_BIT if precision == "fp8" else SDPA


def is_eight_bit(requested: str) -> bool:
    """Is "auto" or a variant's name one of 8 bit? Auto is none: it follows the precision."""
    return requested in VARIANTS and VARIANTS[requested].eight_bit


def choose_attention(
    requested: str, precision: str, device: torch.device | str, head_dim: int
) -> tuple[AttentionVariant, str]:
    """→ (variant, why). requested: "auto" or a key of VARIANTS; precision: fp32, bf16, fp16 or fp8.

    Raises InputError if the named variant is unknown or cannot run here."""
    device = torch.device(device)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if requested != "auto":
        if requested not in VARIANTS:
            raise InputError(f"unknown attention {requested!r}; choose auto, {', '.join(VARIANTS)}")
        named = VARIANTS[requested]
        problem = obstacle(named, precision, capability, head_dim)
        if problem:
            raise InputError(f"attention {requested!r} cannot run: {problem}; choose another or auto")
        return named, f"{_description(named, device, head_dim, precision)}, as asked"
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
    """What `variant` is; on a GPU, where it has two kernels, also which of them runs and why not the other."""
    if not variant.sm90 or device.type != "cuda":
        return variant.description
    problem = hopper_obstacle(device, head_dim, variant.operand_type(precision))
    kernel = "the sm90 CUDA kernel" if problem is None else f"Triton, not the sm90 CUDA kernel: {problem}"
    return f"{variant.description} ({kernel})"


def hopper_obstacle(device: torch.device, head_dim: int, operands: torch.dtype) -> str | None:
    """Why the kernel written for sm90 for int8, bf16 or fp16 q and k cannot run on this GPU, or None. The first call
    may compile and load it: `choose_attention` makes that call, so that none falls into the capture of a CUDA graph."""
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
    """Why `variant` cannot run on a GPU of this capability (None: a CPU), or None if it can."""
    if variant.lowest is None or (variant.eight_bit and capability is None):
        return None  # the twins of the 8-bit ones run anywhere
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
