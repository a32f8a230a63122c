"""The transformer over stages against the plain reference model, on random weights and inputs."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from scail2_rt.engines.engine_set import EngineSet, Execution, open_engines
from scail2_rt.export.models.dit import DiT, DiTInputs, patchify, unpatchify
from scail2_rt.runtime.core.geometry import Layout
from scail2_rt.runtime.pipeline.transformer import References, Schedule, Transformer, context_kv
from tests.support.small import DIT, build_small, small_checkpoint

F, H, W, EXTRA = 3, 8, 12, 2
ERROR = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 3e-2, "fp8": 0.15}  # relative; fp8 rounds every operand to three bits


@pytest.fixture(scope="module")
def inputs() -> DiTInputs:
    generator = torch.Generator().manual_seed(5)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    history = torch.zeros(4, F, H, W)
    history[:, :1] = 1
    reference_mask = torch.zeros(28, 1 + F, H, W)
    reference_mask[:, 0] = randn(28, H, W).abs()
    return DiTInputs(
        latent=randn(16, F, H, W),
        driving=randn(16, F, H // 2, W // 2),
        reference=randn(16, 1, H, W),
        reference_mask=reference_mask,
        driving_mask=randn(28, F, H // 2, W // 2).abs(),
        text=randn(9, DIT.text_dim),
        clip=randn(257, DIT.clip_dim),
        history_mask=history,
        additional_refs=randn(16, EXTRA, H, W),
        additional_masks=randn(28, EXTRA, H, W).abs(),
        replace=True,
    )


@pytest.fixture(scope="module")
def model() -> DiT:
    source = small_checkpoint().sources["dit"]
    model = DiT(DIT).eval().requires_grad_(False)
    model.load_state_dict({name: source.get(name).float() for name in source.keys()})  # noqa: SIM118
    return model


@pytest.fixture(scope="module", params=list(ERROR))
def engines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineSet]:
    folder = tmp_path_factory.mktemp("engines") / "small"
    build_small(folder, request.param)
    with open_engines(folder, "torch") as opened:
        yield opened


def transformer_of(engines: EngineSet, inputs: DiTInputs, texts: list[Tensor]) -> Transformer:
    assert inputs.additional_refs is not None
    assert inputs.additional_masks is not None
    masks = inputs.reference_mask[:, :1], inputs.additional_refs, inputs.additional_masks
    contexts = context_kv(engines, texts, inputs.clip)
    transformer = Transformer(engines, Layout(F, H, W, EXTRA, inputs.replace), contexts)
    transformer.show_references(References(inputs.reference, *masks))
    transformer.show_driving(inputs.driving, inputs.driving_mask)
    return transformer


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def test_both_guidance_passes_agree_with_the_reference(engines: EngineSet, model: DiT, inputs: DiTInputs) -> None:
    other = torch.randn(3, DIT.text_dim, generator=torch.Generator().manual_seed(6))
    transformer = transformer_of(engines, inputs, [inputs.text, other])
    schedule = Schedule.of(engines, [999, 437.5])
    assert inputs.history_mask is not None
    for step, t in enumerate([999, 437.5]):
        guided, unguided = transformer.velocities(inputs.latent, inputs.history_mask, schedule, step)
        limit = ERROR[engines.manifest.precision]
        assert relative_error(guided, model(inputs, t)) < limit
        fields = {name: getattr(inputs, name) for name in inputs.__dataclass_fields__}
        assert relative_error(unguided, model(DiTInputs(**{**fields, "text": other}), t)) < limit
        assert relative_error(guided, unguided) > 10 * ERROR["fp32"]  # the text matters, so the test can fail


def test_row_chunks_leave_the_velocity_alone(tmp_path: Path, inputs: DiTInputs) -> None:
    """In fp32: chunk sizes change the last bits of 16-bit and 8-bit GEMMs."""
    assert inputs.history_mask is not None
    build_small(tmp_path / "small")
    velocities = []
    for max_rows in (1000, 37):  # 162 tokens: one piece; five pieces, the last one padded
        with open_engines(tmp_path / "small", "torch", Execution(max_rows=max_rows)) as engines:
            transformer, schedule = transformer_of(engines, inputs, [inputs.text]), Schedule.of(engines, [500])
            velocities += transformer.velocities(inputs.latent, inputs.history_mask, schedule, 0)
    assert relative_error(velocities[1], velocities[0]) < 1e-6


def test_context_weights_leave_memory_after_use(engines: EngineSet, inputs: DiTInputs) -> None:
    transformer_of(engines, inputs, [inputs.text])
    assert not [name for name in engines.loaded if "context" in name]


def test_patches_survive_the_way_to_rows_and_back() -> None:
    latent = torch.randn(16, F, H, W)
    rows = patchify(latent)
    assert rows.shape == (F * H * W // 4, 64)
    conv = torch.nn.Conv3d(16, 5, (1, 2, 2), (1, 2, 2), bias=False)
    with torch.no_grad():
        want = conv(latent[None])[0].flatten(1).T
        assert torch.allclose(rows @ conv.weight.flatten(1).T, want, atol=1e-5)
    channel_last = rows.view(-1, 16, 4).transpose(1, 2).flatten(1)
    assert torch.equal(unpatchify(channel_last, F, H, W), latent)
