"""Which sizes plans are built for."""

from dataclasses import replace

import pytest

from scail2_rt.engines.tensorrt_backend.profiles import InputRange, PlanOptions, plan_options, stage_profiles
from scail2_rt.export.models.config import CLIPConfig, DiTConfig, ModelConfig, UMT5Config, VAEConfig
from scail2_rt.export.stages.definitions import stage_definitions
from scail2_rt.export.stages.spec import TensorSpec
from scail2_rt.kernels.errors import InputError, Scail2Error
from tests.support.tensorrt_api.installed import PICTURE

FULL = ModelConfig(
    dit=DiTConfig(dim=5120, heads=40, layers=2, ffn_dim=13824),
    vae=VAEConfig(dim=96),
    umt5=UMT5Config(vocab=256384, dim=4096, attn_dim=4096, ffn_dim=10240, heads=64, layers=2),
    clip=CLIPConfig(image_size=224, patch=14, dim=1280, heads=16, layers=32, mlp_dim=5120),
)
STAGES = stage_definitions(FULL)


def profiles(name: str, options: PlanOptions | None = None) -> tuple[dict[str, InputRange], ...]:
    stage = STAGES[name]
    return tuple(map(dict, stage_profiles(stage, stage.numerics("fp8"), FULL, options or PlanOptions())))


def test_every_free_dimension_of_the_model_has_a_range() -> None:
    for name, stage in STAGES.items():
        specs = stage.io(stage.numerics("fp8"))[0]
        found = profiles(name)
        dynamic = {spec.name for spec in specs if any(isinstance(dim, str) for dim in spec.dims)}
        assert len(found) == (0 if not dynamic else 2 if stage.component == "vae" else 1)
        for profile in found:
            assert set(profile) == dynamic
            for spec in specs:
                if spec.name in dynamic:
                    shapes = profile[spec.name]
                    assert all(low <= opt <= high for low, opt, high in zip(*shapes, strict=True))
                    for dim, *sizes in zip(spec.dims, *shapes, strict=True):
                        assert isinstance(dim, str) or sizes == [dim] * 3


def test_ranges() -> None:
    assert profiles("dit.blocks.0.qkv")[0]["x"] == ((1, 5120), (8192, 5120), (16384, 5120))
    assert profiles("dit.context") == ({"text": ((512, 4096),) * 3, "clip": ((257, 1280),) * 3},)
    assert profiles("umt5.layers.0")[0]["buckets"] == ((1, 1), (512, 512), (512, 512))
    assert profiles("clip") == ()
    landscape, portrait = profiles("vae.encode_step")
    assert landscape["video"] == ((1, 3, 4, 16, 16), (1, 3, 4, 512, 896), (1, 3, 4, 704, 1280))
    assert portrait["video"] == ((1, 3, 4, 16, 16), (1, 3, 4, 896, 512), (1, 3, 4, 1280, 704))
    for video, cache in ((landscape["video"], landscape["cache_0"]), (portrait["video"], portrait["cache_0"])):
        assert all(v[3] * c[4] == v[4] * c[3] for v, c in zip(video, cache, strict=True)), "caches follow the video"


def test_options_move_the_limits() -> None:
    small = PlanOptions(max_rows=512, max_picture=(640, 384))
    assert profiles("dit.head", small)[0]["x"] == ((1, 5120), (512, 5120), (512, 5120))
    assert profiles("vae.decode_first", small)[1]["latent"] == (
        (1, 16, 1, 2, 2),
        (1, 16, 1, 80, 48),
        (1, 16, 1, 80, 48),
    )
    for wrong in ({"max_picture": (700, 1280)}, {"max_picture": (0, 1280)}, {"max_rows": 0}, {"optimization_level": 0}):
        with pytest.raises(InputError):
            PlanOptions(**wrong)  # type: ignore[arg-type]


def test_options_of_the_command_line() -> None:
    assert plan_options(None, None) is None
    assert plan_options((512, 512), None) == PlanOptions(max_picture=(512, 512))
    assert plan_options(None, 0.5) == PlanOptions(workspace_bytes=1 << 29)


def test_a_range_holds_shapes() -> None:
    limit = InputRange((1, 4), (2, 4), (3, 4))
    assert limit.holds((3, 4))
    assert not limit.holds((4, 4))
    assert not limit.holds((3,))


def test_an_unknown_size_is_a_fault() -> None:
    stage = replace(PICTURE, io=lambda n: ((TensorSpec("video", n.compute, ("q",)),), ()))
    with pytest.raises(Scail2Error, match="the size q of its input video is unknown"):
        stage_profiles(stage, stage.numerics("fp32"), FULL, PlanOptions())
