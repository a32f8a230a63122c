"""The torch backend on a GPU: CUDA graphs, streamed weights, chunks and every attention variant, compared with eager,
resident, unchunked and fp32 runs. Skipped without a GPU."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from scail2_rt.engines.build.build import BuildRequest, build
from scail2_rt.engines.engine_set import EngineSet, Execution, open_engines
from scail2_rt.export.checkpoint.derive import dit_shapes, vae_shapes
from scail2_rt.export.checkpoint.open import Checkpoint
from scail2_rt.export.checkpoint.random_checkpoint import random_tensor
from scail2_rt.export.checkpoint.tensors import MappingSource
from scail2_rt.export.models.config import DiTConfig, ModelConfig, VAEConfig
from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.core.geometry import Layout
from scail2_rt.runtime.pipeline.constants import Constants
from scail2_rt.runtime.pipeline.placement import BLOCK_STAGES
from scail2_rt.runtime.pipeline.transformer import References
from scail2_rt.runtime.pipeline.vae import decode, encode_clip
from scail2_rt.runtime.session.warm import run_small

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
DIT = DiTConfig(dim=512, heads=4, layers=5, ffn_dim=1024, text_dim=64, clip_dim=160)
VAE = VAEConfig(dim=24)
F, H, W = 3, 12, 20
PRECISIONS = ("fp32", "bf16", "fp16", "fp8")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("gpu")
    sources = {
        part: MappingSource({name: random_tensor(part, name, shape, 0) for name, shape in shapes.items()})
        for part, shapes in (("dit", dit_shapes(DIT)), ("vae", vae_shapes(VAE)))
    }
    checkpoint = Checkpoint(Path("small"), ModelConfig(dit=DIT, vae=VAE), sources, None)
    for precision in PRECISIONS:
        build(BuildRequest(Path("small"), root / precision, ("torch",), precision), checkpoint)
    return {precision: root / precision for precision in PRECISIONS}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).cuda()


def velocities(engines: EngineSet, passes: int = 2, steps: int = 3) -> Tensor:
    """The velocities [steps · passes, 16, F, H, W] for fixed inputs."""
    references = References(
        noise(16, 1, H, W, seed=1),
        noise(28, 1, H, W, seed=2).abs(),
        noise(16, 1, H, W, seed=5),
        noise(28, 1, H, W, seed=6).abs(),
    )
    texts = [noise(9 + i, DIT.text_dim, seed=7 + i) for i in range(passes)]
    constants = Constants(engines)
    contexts = constants.contexts(texts, noise(257, DIT.clip_dim, seed=10))
    transformer = constants.transformer(Layout(F, H, W, 1, True), contexts)
    transformer.show_references(references)
    transformer.show_driving(noise(16, F, H // 2, W // 2, seed=3), noise(28, F, H // 2, W // 2, seed=4).abs())
    schedule = constants.schedule([900.0, 500.0, 100.0])
    history = torch.zeros(4, F, H, W, device="cuda")
    result = []
    for step in range(steps):
        result += transformer.velocities(noise(16, F, H, W, seed=20 + step), history, schedule, step)
    return torch.stack(result).clone()


def run(folder: Path, execution: Execution, streamed: bool = False, **more: int) -> Tensor:
    with open_engines(folder, "torch", execution) as engines:
        if streamed:
            engines.stream([f"dit.blocks.{i}.{name}" for i in range(DIT.layers) for name in BLOCK_STAGES])
        return velocities(engines, **more)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.fixture(scope="module")
def exact(folders: dict[str, Path]) -> Tensor:
    return run(folders["fp32"], Execution(cuda_graphs=False, attention="sdpa"))


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-3), ("bf16", 0.02), ("fp16", 0.005), ("fp8", 0.1)])
def test_each_precision_is_near_fp32(folders: dict[str, Path], exact: Tensor, precision: str, limit: float) -> None:
    assert relative_error(run(folders[precision], Execution()), exact) < limit


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("passes", [1, 2])
def test_a_recorded_graph_computes_what_eager_running_does(
    folders: dict[str, Path], precision: str, passes: int
) -> None:
    eager = run(folders[precision], Execution(cuda_graphs=False), passes=passes)
    assert torch.equal(run(folders[precision], Execution(cuda_graphs=True), passes=passes), eager)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_streamed_weights_compute_what_resident_ones_do(folders: dict[str, Path], precision: str) -> None:
    resident = run(folders[precision], Execution(cuda_graphs=False))
    assert torch.equal(run(folders[precision], Execution(), streamed=True), resident)


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-3), ("bf16", 0.01), ("fp8", 0.05)])
def test_row_chunks_leave_the_velocity_alone(folders: dict[str, Path], precision: str, limit: float) -> None:
    whole = run(folders[precision], Execution(cuda_graphs=False))
    assert relative_error(run(folders[precision], Execution(max_rows=37)), whole) < limit


@pytest.mark.parametrize("variant", ["8bit", "8bit-bf16pv", "bf16", "cudnn", "sdpa"])
def test_each_attention_is_near_fp32(folders: dict[str, Path], exact: Tensor, variant: str) -> None:
    try:
        result = run(folders["bf16"], Execution(attention=variant))
    except InputError as error:
        pytest.skip(f"{variant} cannot run on this GPU: {error}")
    assert relative_error(result, exact) < (0.05 if "8bit" in variant else 0.02)


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-3), ("bf16", 0.01)])
def test_the_vae_is_near_fp32_on_the_cpu(folders: dict[str, Path], precision: str, limit: float) -> None:
    video = noise(3, 9, 48, 80).clamp(-1, 1).cpu()
    with open_engines(folders["fp32"], "torch", device="cpu") as engines:
        latent = encode_clip(engines, video)
        pixels = torch.cat(list(decode(engines, latent)), dim=1)
    with open_engines(folders[precision], "torch") as engines:
        for _ in range(2):  # the second time with buffers that have been used
            assert relative_error(encode_clip(engines, video).cpu(), latent) < limit
            assert relative_error(torch.cat(list(decode(engines, latent.cuda())), dim=1).cpu(), pixels) < limit


def test_a_warm_folder_compiles_nothing(folders: dict[str, Path]) -> None:
    with open_engines(folders["fp8"], "torch") as engines:
        run_small(engines)
        compiled = sorted(path.name for path in (folders["fp8"] / "kernels").rglob("*"))
        run_small(engines)
        assert sorted(path.name for path in (folders["fp8"] / "kernels").rglob("*")) == compiled
