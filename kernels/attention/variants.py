"""Which self-attention runs: chosen once, at start, with the reason in words.

`auto` takes the fastest one whose accuracy the precision asks for; a variant the user named is used or refused. Lossy
ones (those of 8 bit) come with the fp8 precision or by name, never otherwise. "8bit" and "bf16" (16 bit, bf16 or fp16)
are two kernels each for the same operands: the one written for sm90 where that runs, else the Triton one; "8bit-triton"
is always the latter.
"""

from importlib.util import find_spec

import torch

from scail2_rt.kernels.errors import InputError

VARIANTS = {
    "8bit": "int8 QK, fp8 PV with two-level accumulation",
    "8bit-triton": "int8 QK, fp8 PV with two-level accumulation (Triton)",
    "8bit-bf16pv": "int8 QK, 16-bit PV (Triton)",
    "bf16": "16-bit, ours",
    "cudnn": "16-bit, cuDNN through PyTorch",
    "flash": "16-bit, the flash-attn package",
    "sage": "8-bit QK, the sageattention package",
    "sdpa": "PyTorch's own choice",
}
PACKAGES = {"flash": "flash_attn", "sage": "sageattention"}
EIGHT_BIT = ("8bit", "8bit-triton", "8bit-bf16pv")
# major capability → what auto takes for bf16 and fp16, as measured; "bf16" only where its sm90 kernel runs, else cuDNN
SIXTEEN_BIT = {9: "bf16", 10: "cudnn"}
LOWEST = dict.fromkeys(VARIANTS, (8, 0)) | {"8bit": (8, 9), "8bit-triton": (8, 9)}
HEAD_DIMS = dict.fromkeys((*EIGHT_BIT, "bf16"), (64, 128))


def choose_attention(requested: str, precision: str, device: torch.device | str, head_dim: int) -> tuple[str, str]:
    """→ (variant, why). requested: "auto" or a key of VARIANTS; precision: fp32, bf16, fp16 or fp8.

    Raises InputError if the named variant is unknown or cannot run here."""
    device = torch.device(device)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if requested != "auto":
        if requested not in VARIANTS:
            raise InputError(f"unknown attention {requested!r}; choose auto, {', '.join(VARIANTS)}")
        problem = obstacle(requested, precision, capability, head_dim)
        if problem:
            raise InputError(f"attention {requested!r} cannot run: {problem}; choose another or auto")
        return requested, f"{_description(requested, device, head_dim, precision)}, as asked"
    if capability is None:
        return "sdpa", f"{VARIANTS['sdpa']}: the device is {device.type}"
    name, instead = f"sm{capability[0]}{capability[1]}", ""
    if precision == "fp8":
        problem = obstacle("8bit", precision, capability, head_dim)
        if problem is None:
            return "8bit", f"{_description('8bit', device, head_dim, precision)}: precision fp8 on {name}"
        instead = f"; 8bit cannot run: {problem}"
    variant = SIXTEEN_BIT.get(capability[0]) if precision != "fp32" else None
    if variant == "bf16":
        problem = obstacle(variant, precision, capability, head_dim)
        problem = problem or hopper_obstacle(device, head_dim, operand_type(variant, precision))
        if problem is not None:
            variant, instead = "cudnn", f"{instead}; bf16 cannot run in its sm90 CUDA kernel: {problem}"
    if variant is not None:
        described = _description(variant, device, head_dim, precision)
        return variant, f"{described}: the fastest 16-bit one that runs on {name}{instead}"
    return "sdpa", f"{VARIANTS['sdpa']}: precision {precision} on {name}{instead}"


def _description(variant: str, device: torch.device, head_dim: int, precision: str) -> str:
    """What `variant` is; for "8bit" and "bf16" on a GPU also which of its kernels runs and why not the other."""
    if variant not in ("8bit", "bf16") or device.type != "cuda":
        return VARIANTS[variant]
    problem = hopper_obstacle(device, head_dim, operand_type(variant, precision))
    kernel = "the sm90 CUDA kernel" if problem is None else f"Triton, not the sm90 CUDA kernel: {problem}"
    return f"{VARIANTS[variant]} ({kernel})"


def operand_type(variant: str, precision: str) -> torch.dtype:
    """Of q and k, for the variants that have a kernel for sm90."""
    if variant == "8bit":
        return torch.int8
    return torch.float16 if precision == "fp16" else torch.bfloat16


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


def obstacle(variant: str, precision: str, capability: tuple[int, int] | None, head_dim: int) -> str | None:
    """Why `variant` cannot run on a GPU of this capability (None: a CPU), or None if it can."""
    eight_bit = variant in EIGHT_BIT
    if variant == "sdpa" or (eight_bit and capability is None):
        return None  # the twins of the 8-bit ones run anywhere
    if capability is None:
        return "it needs an NVIDIA GPU and the device is a CPU"
    if precision == "fp32" and not eight_bit:
        return "it computes in 16 bit and the precision is fp32"
    if capability < LOWEST[variant]:
        needed, found = LOWEST[variant], capability
        return f"it needs a GPU of capability {needed[0]}.{needed[1]}, this one has {found[0]}.{found[1]}"
    if variant in HEAD_DIMS and head_dim not in HEAD_DIMS[variant]:
        return f"its heads must be 64 or 128 wide, here they are {head_dim}"
    package = PACKAGES.get(variant, "triton" if variant in HEAD_DIMS else None)  # the preparation is Triton's always
    if package is not None and find_spec(package) is None:
        return f"the package {package} is not installed"
    return None
