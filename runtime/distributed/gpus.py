"""How many GPUs a session takes: what was asked for, checked against the machine and the model."""

import torch

from scail2_rt.export.models.config import DiTConfig
from scail2_rt.kernels.errors import InputError

Gpus = int | str  # a number, or "all"


def count_gpus(asked: Gpus, device: str) -> int:
    """The number of processes for `gpus` on "cuda" or "cpu". `all`: every visible GPU; one process on a CPU.

    InputError when there are fewer GPUs."""
    visible = torch.cuda.device_count() if device == "cuda" else None
    if asked == "all":
        return visible or 1
    if isinstance(asked, str) or asked < 1:
        raise InputError(f"--gpus must be 1 or more, or all, not {asked}.")
    if visible is not None and asked > visible:
        raise InputError(
            f"--gpus {asked} was given, but PyTorch finds {visible} here: use at most {visible} "
            "(CUDA_VISIBLE_DEVICES says which are visible)."
        )
    return asked


def check_heads(gpus: int, dit: DiTConfig | None, passes: int = 2) -> None:
    """InputError when a model's heads cannot be divided among so many GPUs. Two passes may take a half of them each."""
    if gpus == 1 or (dit is not None and gpus in working(dit.heads, passes)):
        return
    if dit is None:
        raise InputError(f"--gpus {gpus} shares out a transformer, and the engine folder has none: use --gpus 1.")
    alone, both = working(dit.heads, 1), working(dit.heads, 2)
    more = [count for count in both if count not in alone]
    extra = f"; with guidance also {', '.join(map(str, more))}" if more else ""
    raise InputError(
        f"The model's {dit.heads} attention heads cannot be divided among {gpus} GPUs"
        f"{' without guidance' if gpus in both else ''}: use --gpus {', '.join(map(str, alone))}{extra}."
    )


def working(heads: int, passes: int) -> list[int]:
    """The numbers of GPUs that work for so many heads, with 1 or 2 passes."""
    divisors = [n for n in range(1, heads + 1) if heads % n == 0]
    return sorted({*divisors, *(2 * n for n in divisors if passes == 2)})
