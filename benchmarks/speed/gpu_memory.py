"""GPU memory that a generation needs, computed by the memory model of the runtime: no GPU and no weights are needed.

`python -m scail2_rt.benchmarks.speed.gpu_memory` prints one row per precision, size, guidance and memory limit: how the
weights of the 14B model are placed, and the planned peak. docs/gpus.md shows its figures beside the measured ones.
"""

import argparse
import functools
from types import SimpleNamespace
from typing import Any, cast

from scail2_rt.benchmarks.speed.models import STANDARD, Work, model
from scail2_rt.engines.folder.store import StoreLayout
from scail2_rt.engines.folder.weights import plan_store, planned_tensors
from scail2_rt.export.models.precision import Precision
from scail2_rt.export.stages.definitions import stage_definitions
from scail2_rt.kernels.attention.variants import EIGHT_BIT, SIXTEEN_BIT
from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.core.geometry import plan_segments
from scail2_rt.runtime.session.memory import LIBRARY_BYTES, MemoryModel, choose_placement, memory_model

GIB = 2**30
PRECISIONS: tuple[Precision, ...] = ("fp8", "bf16")


@functools.cache
def store_layout(precision: Precision, name: str = "14b") -> StoreLayout:
    """The weight store of a model, from its shapes alone."""
    config = model(name)
    return plan_store(planned_tensors(config, stage_definitions(config), precision))


def model_of(precision: Precision, work: Work, passes: int, frames: int, name: str = "14b") -> MemoryModel:
    """The memory model of the torch executor on a GPU, for a clip of `frames` frames in segments of `work.frames`."""
    config, layout = model(name), store_layout(precision, name)
    definitions = stage_definitions(config)
    stages = [SimpleNamespace(name=stage, weight_bytes=layout.stage_bytes(stage)) for stage in definitions]
    engines = SimpleNamespace(
        config=config,
        manifest=SimpleNamespace(stages=stages),
        places_weights=True,
        max_rows=16_384,
        attention=EIGHT_BIT if precision == "fp8" else SIXTEEN_BIT,
        compute_dtype=lambda stage: definitions[stage].numerics(precision).compute,
    )
    plan = SimpleNamespace(
        request=SimpleNamespace(passes=passes),
        height=work.height,
        width=work.width,
        layout=work.layout,
        segments=plan_segments(frames, work.frames),
    )
    return memory_model(cast(Any, plan), cast(Any, engines))


def row(precision: Precision, work: Work, passes: int, frames: int, limit: int | None) -> str:
    """One row of the table: what is asked for, and the placement with its peak, or why it cannot run."""
    asked = f"{precision:<5} {work!s:<12} {passes} {'-' if limit is None else limit:>6}"
    found = model_of(precision, work, passes, frames)
    try:
        way = choose_placement(found, (limit or 1000) * GIB - LIBRARY_BYTES)
    except InputError as error:
        return f"{asked}  {str(error).partition(' even')[0]}"
    return f"{asked}  {way.kind:<9} {way.resident_blocks:>2} of {way.blocks}  {(way.needed + LIBRARY_BYTES) / GIB:5.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limits", type=int, nargs="*", default=[24, 16, 12], help="memory limits in GiB")
    parser.add_argument("--frames", type=int, default=81, help="frames of the clip (default: one segment)")
    given = parser.parse_args()
    print("engine folders:", ", ".join(f"{name} {store_layout(name).size / GIB:.1f} GiB" for name in PRECISIONS))
    print("precision size   passes limit  placement  blocks  peak GiB")
    for precision in PRECISIONS:
        for work in (Work(480, 832, 81), *STANDARD[:2]):
            for passes in (1, 2):
                for limit in (None, *given.limits):
                    print(row(precision, work, passes, given.frames, limit))


if __name__ == "__main__":
    main()
