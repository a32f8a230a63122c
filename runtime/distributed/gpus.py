"""Number of GPUs of a session: the requested number, checked against the machine and the model."""

import torch

from scail2_rt.export.models.config import DiTConfig
from scail2_rt.kernels.errors import InputError

Gpus = int | str  # a number, or "all"


def count_gpus(asked: Gpus, device: str) -> int:
    """Return the number of ranks for `--gpus` on "cuda" or "cpu". "all": every visible GPU; one rank on a CPU.

    Raises InputError if there are fewer GPUs."""
    visible = torch.cuda.device_count() if device == "cuda" else None
    if asked == "all":
        return visible or 1
    if isinstance(asked, str) or asked < 1:
        raise InputError(f"--gpus must be 1 or more, or all, not {asked}. Use --gpus 1 or --gpus all.")
    if visible is not None and asked > visible:
        raise InputError(
            f"--gpus {asked} was given, but PyTorch finds {visible} here (CUDA_VISIBLE_DEVICES limits the visible "
            f"GPUs). Use --gpus {visible or 1} or fewer, or --gpus all."
        )
    return asked


def check_heads(gpus: int, dit: DiTConfig | None, passes: int = 2) -> None:
    """Raise InputError if a model's heads cannot be divided among `gpus` ranks. Two passes may take half each."""
    if gpus == 1 or (dit is not None and gpus in working(dit.heads, passes)):
        return
    if dit is None:
        raise InputError(f"--gpus {gpus} divides a transformer, and the engine folder has none. Use --gpus 1.")
    alone, both = working(dit.heads, 1), working(dit.heads, 2)
    more = [count for count in both if count not in alone]
    extra = f", with guidance also {', '.join(map(str, more))}" if more else ""
    raise InputError(
        f"The model's {dit.heads} attention heads cannot be divided among {gpus} GPUs"
        f"{' without guidance' if gpus in both else ''}. Use --gpus {', '.join(map(str, alone))}{extra}."
    )


def working(heads: int, passes: int) -> list[int]:
    """Return the numbers of GPUs that can divide so many heads, with 1 or 2 guidance passes."""
    divisors = [n for n in range(1, heads + 1) if heads % n == 0]
    return sorted({*divisors, *(2 * n for n in divisors if passes == 2)})
