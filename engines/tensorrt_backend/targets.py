"""The architectures that plans are built for, and the precisions that each supports.

A library that compiles for other machines needs targets: those named by the user, else those of the folder's earlier
build, else this machine's card, else all that support the precision. A stage's requirement follows from its types: sm89
for e4m3, sm80 for bf16. (The precision fp16 keeps the text encoder in bf16, so it needs sm80 too.)
"""

from collections.abc import Iterable

import torch

from scail2_rt.engines.tensorrt_backend.library import Library
from scail2_rt.export.models.precision import PRECISIONS, Precision
from scail2_rt.export.stages.spec import StageDefinition
from scail2_rt.kernels.errors import InputError

Capability = tuple[int, int]
FP8_CAPABILITY = (8, 9)
BF16_CAPABILITY = (8, 0)


def capability_of(target: str) -> Capability:
    """Convert "sm120" to (12, 0)."""
    digits = target.removeprefix("sm")
    return int(digits[:-1]), int(digits[-1])


def target_of(capability: Capability) -> str:
    """Convert (12, 0) to "sm120"."""
    return f"sm{capability[0]}{capability[1]}"


def needed_capability(definitions: Iterable[StageDefinition], precision: Precision) -> Capability:
    """Return the lowest compute capability that supports all of these stages."""
    numerics = [definition.numerics(precision) for definition in definitions]
    if any(n.fp8 for n in numerics):
        return FP8_CAPABILITY
    return BF16_CAPABILITY if any(torch.bfloat16 in (n.storage, n.compute) for n in numerics) else (0, 0)


def choose_targets(
    library: Library,
    named: tuple[str, ...],
    before: tuple[str, ...],
    here: Capability | None,
    definitions: Iterable[StageDefinition],
    precision: Precision,
) -> tuple[str, ...]:
    """Return the targets of a build, in the library's order; none for a library that builds for this machine's GPU.

    named: by the user; before: of the folder's earlier build; here: capability of this machine's card. Raises
    InputError for targets that cannot be built."""
    if library.compiles_here:
        if named:
            raise InputError(f"backend {library.name} builds for the GPU of this machine only. Leave out --target.")
        return ()
    unknown = [target for target in named if target not in library.targets]
    if unknown:
        cards = f"{library.title} builds for {', '.join(library.targets)}"
        raise InputError(
            f"--target {','.join(unknown)} cannot be built: {cards}. For other GPUs (such as sm90 and sm100) use "
            "--backend torch."
        )
    stages = list(definitions)
    able = [t for t in library.targets if capability_of(t) >= needed_capability(stages, precision)]
    card = target_of(here) if here is not None else None
    own = (card,) if card in library.targets else ()
    chosen = named or before or own or tuple(able)
    for target in chosen:
        if target not in able:
            can = [p for p in PRECISIONS if capability_of(target) >= needed_capability(stages, p)]
            raise InputError(
                f"precision {precision} needs an architecture among {', '.join(able)}, which {target} is not. "
                f"Use --precision {' or '.join(can)}{'' if named else ', or name others with --target'}."
            )
    return tuple(target for target in library.targets if target in chosen)
