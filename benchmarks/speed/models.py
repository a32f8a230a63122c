"""Models and clip sizes for measurements without a checkpoint."""

from dataclasses import dataclass, replace

from scail2_rt.export.checkpoint.random_checkpoint import PRESETS
from scail2_rt.export.models.config import CLIPConfig, DiTConfig, ModelConfig, UMT5Config, VAEConfig
from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.core.geometry import Layout

_TINY = PRESETS["tiny"]
_VAE, _CLIP = VAEConfig(dim=96), CLIPConfig(image_size=224, patch=14, dim=1280, heads=16, layers=32, mlp_dim=5120)
_UMT5 = UMT5Config(vocab=256_384, dim=4096, attn_dim=4096, ffn_dim=10_240, heads=64, layers=24)
MODELS: dict[str, ModelConfig] = {
    "14b": ModelConfig(DiTConfig(dim=5120, heads=40, layers=40, ffn_dim=13_824), _VAE, _UMT5, _CLIP),
    "1.3b": ModelConfig(DiTConfig(dim=1536, heads=12, layers=30, ffn_dim=8960), _VAE, _UMT5, _CLIP),
    "tiny": ModelConfig(_TINY.dit, _TINY.vae, _TINY.umt5, _TINY.clip),
}


@dataclass(frozen=True, slots=True)
class Work:
    """The size of one clip: pixels and frames, with one reference image."""

    height: int
    width: int
    frames: int

    @property
    def layout(self) -> Layout:
        return Layout.of(self.frames, self.height, self.width)

    @property
    def tokens(self) -> int:
        return self.layout.tokens

    def __str__(self) -> str:
        return f"{self.height}x{self.width}x{self.frames}"


STANDARD = (Work(512, 896, 81), Work(704, 1280, 81), Work(480, 832, 81))  # 48,832, 95,920 and 42,510 tokens
SMALL = Work(64, 96, 13)  # for the tiny model on a CPU


def model(name: str, layers: int | None = None) -> ModelConfig:
    """The configuration of a named model, with at most `layers` transformer blocks. Raises InputError for an unknown
    name."""
    if name not in MODELS:
        raise InputError(f"There is no model {name!r}. Choose from {', '.join(MODELS)}.")
    config = MODELS[name]
    assert config.dit is not None
    return config if layers is None else replace(config, dit=replace(config.dit, layers=min(layers, config.dit.layers)))


def parse_sizes(text: str) -> tuple[Work, ...]:
    """Parse sizes such as `48832,480x832x81`: token counts of standard sizes, or height x width x frames. Raises
    InputError for other texts and impossible sizes."""
    by_tokens = {work.tokens: work for work in (*STANDARD, SMALL)}
    works = []
    for part in text.split(","):
        numbers = part.strip().split("x")
        if not all(number.isdecimal() for number in numbers) or len(numbers) not in (1, 3):
            raise InputError(f"--sizes: {part!r} is not a size. Give a token count or HEIGHTxWIDTHxFRAMES.")
        if len(numbers) == 3:
            works.append(Work(*(int(number) for number in numbers)))
        elif int(numbers[0]) in by_tokens:
            works.append(by_tokens[int(numbers[0])])
        else:
            known = ", ".join(f"{tokens} ({work})" for tokens, work in by_tokens.items())
            raise InputError(
                f"--sizes: no standard size has {part} tokens. Give {known}, or a size such as 512x896x81."
            )
    for work in works:
        _ = work.layout  # raises for impossible sizes
    return tuple(works)


def default_sizes(config: str) -> tuple[Work, ...]:
    """The clip sizes to measure for a model."""
    return (SMALL,) if config == "tiny" else STANDARD[:2]
