"""`python -m tests.support.warm_graphs`: trace the VAE graphs that the tests need into the cache, two at a time.

A trace takes half a minute, and twice as long under coverage; so `make test` does it before it measures coverage. Tests
trace what is missing, so skipping this costs time only."""

from concurrent.futures import ProcessPoolExecutor

from scail2_rt.export.models.precision import FP16, FP32, Numerics
from scail2_rt.export.onnx.stages import stage_graph
from scail2_rt.export.stages.definitions import stage_definitions
from tests.support.onnx_case import REAL, SMALL

VAE = ("vae.decode_step", "vae.encode_step", "vae.decode_first", "vae.encode_first")
SIZES = {"small": SMALL, "real": REAL}


def trace(size: str, stage: str, numerics: Numerics) -> None:
    stage_graph(stage_definitions(SIZES[size])[stage], numerics)


def main() -> None:
    graphs = [(size, stage, FP32) for size in SIZES for stage in VAE]
    graphs += [("small", stage, FP16) for stage in VAE]
    with ProcessPoolExecutor(2) as pool:
        for done in [pool.submit(trace, *graph) for graph in graphs]:
            done.result()


if __name__ == "__main__":
    main()
