"""`python -m tests.support.warm_graphs`: trace the graphs that many tests need into the cache, two concurrently.

A trace takes up to half a minute, and two or three times as long under coverage. `make test` therefore does this first,
without coverage and once for all processes. It is optional: tests trace missing graphs."""

from concurrent.futures import ProcessPoolExecutor

from scail2_rt.benchmarks.sprites.shipped import CHECKPOINT
from scail2_rt.export.checkpoint.open import open_checkpoint
from scail2_rt.export.checkpoint.random_checkpoint import PRESETS
from scail2_rt.export.models.config import ModelConfig
from scail2_rt.export.models.precision import FP16, FP32, Numerics
from scail2_rt.export.onnx.stages import stage_graph
from scail2_rt.export.stages.definitions import stage_definitions
from tests.support.onnx_case import REAL, SMALL, kinds_of_numerics

_TINY, _SPRITES = PRESETS["tiny"], open_checkpoint(CHECKPOINT).config
TINY = ModelConfig(dit=_TINY.dit, vae=_TINY.vae, umt5=_TINY.umt5, clip=_TINY.clip)
SPRITES = ModelConfig(dit=_SPRITES.dit, vae=_SPRITES.vae, umt5=_SPRITES.umt5, clip=_SPRITES.clip)
SIZES = {"small": SMALL, "tiny": TINY, "real": REAL, "sprites": SPRITES}


def trace(size: str, stage: str, numerics: Numerics) -> None:
    stage_graph(stage_definitions(SIZES[size])[stage], numerics)


def graphs() -> list[tuple[str, str, Numerics]]:
    """One stage per family, the slowest first, so that both processes end at about the same time."""
    found = []
    for size, config in SIZES.items():
        families = {stage.family or name: stage for name, stage in reversed(stage_definitions(config).items())}
        for stage in families.values():
            vae = stage.component == "vae"
            if vae and size == "tiny":
                continue  # as small
            kinds = [FP32] if size == "real" else [FP32, FP16] if vae else kinds_of_numerics(stage)
            kinds = [stage.numerics("bf16")] if size == "sprites" else kinds
            found += [(size, stage.name, kind) for kind in kinds]
    return sorted(found, key=lambda graph: not graph[1].startswith("vae"))


def main() -> None:
    with ProcessPoolExecutor(2) as pool:
        for done in [pool.submit(trace, *graph) for graph in graphs()]:
            done.result()


if __name__ == "__main__":
    main()
