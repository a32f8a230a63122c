"""Sizes of the networks, derived from the shapes of their tensors, and the shapes that such sizes imply.

Every size is decided by majority among all tensors that show it, so that one wrong or missing tensor does not change
the result: `check_shapes` then names it, with its expected shape. Constants of the program (16 latent, 4 history and 28
mask channels, patch 1x2x2) are not derived. Shapes do not determine the head widths: 128 in the transformer and 80 in
CLIP, unless the metadata key `config` (a JSON string, in a safetensors file or from a `config.json` beside it) has
`num_heads` or `head_dim`.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from scail2_rt.export.models.config import CLIPConfig, DiTConfig, UMT5Config, VAEConfig
from scail2_rt.kernels.errors import InputError

Shapes = Mapping[str, tuple[int, ...]]
Votes = tuple[tuple[str, int], ...]  # (tensor name with * for numbers, axis that shows the size)

DIT_HEAD_DIM = 128
CLIP_HEAD_DIM = 80
CLIP_OUT_DIM = 1024  # of `visual.head`, which is not used
_PATCH = (1, 2, 2)
_LISTED_PROBLEMS = 5
_DIT_DEFAULTS = DiTConfig(dim=128, heads=1, layers=1, ffn_dim=128)
_UMT5_DEFAULTS = UMT5Config(vocab=1, dim=1, attn_dim=1, ffn_dim=1, heads=1, layers=1)

_DIT_DIM: Votes = (
    ("blocks.*.norm3.weight", 0),
    ("blocks.*.self_attn.q.weight", 1),
    ("blocks.*.modulation", 2),
    ("patch_embedding.bias", 0),
    ("text_embedding.2.bias", 0),
    ("head.head.weight", 1),
)
_DIT_FFN: Votes = (("blocks.*.ffn.0.weight", 0), ("blocks.*.ffn.0.bias", 0), ("blocks.*.ffn.2.weight", 1))
_DIT_CLIP: Votes = (("img_emb.proj.0.weight", 0), ("img_emb.proj.1.weight", 1), ("img_emb.proj.3.weight", 1))
_UMT5_DIM: Votes = (
    ("token_embedding.weight", 1),
    ("norm.weight", 0),
    ("blocks.*.norm1.weight", 0),
    ("blocks.*.norm2.weight", 0),
)
_UMT5_ATTN: Votes = (("blocks.*.attn.q.weight", 0), ("blocks.*.attn.k.weight", 0), ("blocks.*.attn.o.weight", 1))
_UMT5_FFN: Votes = (("blocks.*.ffn.fc1.weight", 0), ("blocks.*.ffn.gate.0.weight", 0), ("blocks.*.ffn.fc2.weight", 1))
_CLIP_DIM: Votes = (
    ("visual.transformer.*.norm1.weight", 0),
    ("visual.transformer.*.norm2.bias", 0),
    ("visual.pre_norm.weight", 0),
    ("visual.cls_embedding", 2),
)
_CLIP_MLP: Votes = (("visual.transformer.*.mlp.0.weight", 0), ("visual.transformer.*.mlp.0.bias", 0))


def dit_config(shapes: Shapes, metadata: Mapping[str, str] | None = None) -> DiTConfig:
    """Derive the sizes of a transformer with Wan names. Raises InputError if a size is unknown."""
    settings = _settings(metadata)
    dim = _vote(shapes, "transformer", _DIT_DIM)
    return DiTConfig(
        dim=dim,
        heads=_heads("transformer", dim, settings, DIT_HEAD_DIM),
        layers=_count(shapes, "transformer", r"blocks\.(\d+)\."),
        ffn_dim=_vote(shapes, "transformer", _DIT_FFN),
        freq_dim=_vote(shapes, "transformer", (("time_embedding.0.weight", 1),), _DIT_DEFAULTS.freq_dim),
        text_dim=_vote(shapes, "transformer", (("text_embedding.0.weight", 1),), _DIT_DEFAULTS.text_dim),
        clip_dim=_vote(shapes, "transformer", _DIT_CLIP, _DIT_DEFAULTS.clip_dim),
        text_len=int(_number(settings, "text_len", _DIT_DEFAULTS.text_len)),
        eps=_number(settings, "eps", _DIT_DEFAULTS.eps),
    )


def vae_config(shapes: Shapes, metadata: Mapping[str, str] | None = None) -> VAEConfig:
    """Derive the sizes of a causal VAE: levels end where the encoder down-samples. Raises like `dit_config`."""
    kinds = {"resample": set[int](), "time_conv": set[int]()}
    for name in shapes:
        match = re.match(r"encoder\.downsamples\.(\d+)\.(resample|time_conv)\.", name)
        if match:
            kinds[match.group(2)].add(int(match.group(1)))
    stages = sorted(kinds["resample"] | kinds["time_conv"])
    if not stages:
        raise InputError("The VAE has no tensor encoder.downsamples.2.resample.1.weight. Give a Wan 2.1 VAE.")
    res_blocks = stages[0]
    dim = _vote(shapes, "VAE", (("encoder.conv1.weight", 0), ("encoder.conv1.bias", 0), ("decoder.head.0.gamma", 0)))
    widths = []
    for level in range(len(stages) + 1):
        block = f"encoder.downsamples.{level * (res_blocks + 1)}.residual"
        widths.append(_vote(shapes, "VAE", ((f"{block}.2.bias", 0), (f"{block}.3.gamma", 0), (f"{block}.6.weight", 0))))
    if any(width % dim for width in widths):
        raise InputError(
            f"The VAE's levels have {widths} channels, which are not multiples of its base width {dim}. Give a Wan 2.1 "
            "VAE."
        )
    return VAEConfig(
        dim=dim,
        z_dim=_vote(shapes, "VAE", (("conv2.weight", 0), ("conv2.bias", 0), ("decoder.conv1.weight", 1))),
        dim_mult=tuple(width // dim for width in widths),
        res_blocks=res_blocks,
        temporal_downsample=tuple(stage in kinds["time_conv"] for stage in stages),
    )


def umt5_config(shapes: Shapes, metadata: Mapping[str, str] | None = None) -> UMT5Config:
    """Derive the sizes of an umT5 encoder; a position table has one column per head. Raises like `dit_config`."""
    settings = _settings(metadata)
    heads = _vote(shapes, "umT5", (("blocks.*.pos_embedding.embedding.weight", 1),))
    attn_dim = _vote(shapes, "umT5", _UMT5_ATTN)
    if attn_dim % heads:
        raise InputError(
            f"The umT5 attention width {attn_dim} does not divide into the {heads} heads of its table. Give umT5-XXL."
        )
    return UMT5Config(
        vocab=_vote(shapes, "umT5", (("token_embedding.weight", 0),)),
        dim=_vote(shapes, "umT5", _UMT5_DIM),
        attn_dim=attn_dim,
        ffn_dim=_vote(shapes, "umT5", _UMT5_FFN),
        heads=heads,
        layers=_count(shapes, "umT5", r"blocks\.(\d+)\."),
        buckets=_vote(shapes, "umT5", (("blocks.*.pos_embedding.embedding.weight", 0),)),
        max_distance=int(_number(settings, "max_dist", _UMT5_DEFAULTS.max_distance)),
        eps=_number(settings, "eps", _UMT5_DEFAULTS.eps),
    )


def clip_config(shapes: Shapes, metadata: Mapping[str, str] | None = None) -> CLIPConfig:
    """Derive the sizes of a CLIP visual tower with `visual.` names. Raises InputError like `dit_config`."""
    dim = _vote(shapes, "CLIP", _CLIP_DIM)
    patch = _vote(shapes, "CLIP", (("visual.patch_embedding.weight", 2), ("visual.patch_embedding.weight", 3)))
    tokens = _vote(shapes, "CLIP", (("visual.pos_embedding", 1),))
    side = math.isqrt(max(tokens - 1, 0))
    if side * side != tokens - 1:
        raise InputError(
            f"CLIP's visual.pos_embedding has {tokens} rows, which are not one class row and a square grid. Give the "
            "CLIP tower of Wan 2.1."
        )
    return CLIPConfig(
        image_size=side * patch,
        patch=patch,
        dim=dim,
        heads=_heads("CLIP", dim, _settings(metadata), CLIP_HEAD_DIM),
        layers=_count(shapes, "CLIP", r"visual\.transformer\.(\d+)\."),
        mlp_dim=_vote(shapes, "CLIP", _CLIP_MLP),
    )


def dit_shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the transformer's tensors, by their Wan names."""
    c, ffn = config.dim, config.ffn_dim
    shapes: dict[str, tuple[int, ...]] = {}
    for suffix, channels in (("", config.in_channels), ("_pose", config.in_channels), ("_mask", config.mask_channels)):
        shapes |= _linear(f"patch_embedding{suffix}", c, channels, *_PATCH)
    shapes |= _linear("text_embedding.0", c, config.text_dim) | _linear("text_embedding.2", c, c)
    shapes |= _linear("time_embedding.0", c, config.freq_dim) | _linear("time_embedding.2", c, c)
    shapes |= _linear("time_projection.1", 6 * c, c)
    for i in range(config.layers):
        block = f"blocks.{i}"
        shapes[f"{block}.modulation"] = (1, 6, c)
        for attention, linears in (("self_attn", "q k v o"), ("cross_attn", "q k v o k_img v_img")):
            for linear in linears.split():
                shapes |= _linear(f"{block}.{attention}.{linear}", c, c)
        for norm in ("self_attn.norm_q", "self_attn.norm_k", "cross_attn.norm_q", "cross_attn.norm_k"):
            shapes[f"{block}.{norm}.weight"] = (c,)
        shapes[f"{block}.cross_attn.norm_k_img.weight"] = (c,)
        shapes |= _norm(f"{block}.norm3", c)
        shapes |= _linear(f"{block}.ffn.0", ffn, c) | _linear(f"{block}.ffn.2", c, ffn)
    shapes["head.modulation"] = (1, 2, c)
    shapes |= _linear("head.head", math.prod(_PATCH) * config.out_channels, c)
    shapes |= _norm("img_emb.proj.0", config.clip_dim) | _linear("img_emb.proj.1", config.clip_dim, config.clip_dim)
    return shapes | _linear("img_emb.proj.3", c, config.clip_dim) | _norm("img_emb.proj.4", c)


def umt5_shapes(config: UMT5Config) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the umT5 encoder's tensors (there are no biases)."""
    shapes: dict[str, tuple[int, ...]] = {
        "token_embedding.weight": (config.vocab, config.dim),
        "norm.weight": (config.dim,),
    }
    for i in range(config.layers):
        block = f"blocks.{i}"
        shapes[f"{block}.norm1.weight"] = shapes[f"{block}.norm2.weight"] = (config.dim,)
        shapes |= {f"{block}.attn.{name}.weight": (config.attn_dim, config.dim) for name in "qkv"}
        shapes[f"{block}.attn.o.weight"] = (config.dim, config.attn_dim)
        shapes |= {f"{block}.ffn.{name}.weight": (config.ffn_dim, config.dim) for name in ("gate.0", "fc1")}
        shapes[f"{block}.ffn.fc2.weight"] = (config.dim, config.ffn_dim)
        shapes[f"{block}.pos_embedding.embedding.weight"] = (config.buckets, config.heads)
    return shapes


def clip_shapes(config: CLIPConfig, out_dim: int = CLIP_OUT_DIM) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the CLIP tower's tensors, including unused ones (`log_scale`, `head`, `post_norm`)."""
    c = config.dim
    shapes: dict[str, tuple[int, ...]] = {
        "log_scale": (),
        "visual.cls_embedding": (1, 1, c),
        "visual.pos_embedding": (1, config.tokens, c),
        "visual.head": (c, out_dim),
        "visual.patch_embedding.weight": (c, 3, config.patch, config.patch),
    }
    shapes |= _norm("visual.pre_norm", c) | _norm("visual.post_norm", c)
    for i in range(config.layers):
        block = f"visual.transformer.{i}"
        shapes |= _norm(f"{block}.norm1", c) | _norm(f"{block}.norm2", c)
        shapes |= _linear(f"{block}.attn.to_qkv", 3 * c, c) | _linear(f"{block}.attn.proj", c, c)
        shapes |= _linear(f"{block}.mlp.0", config.mlp_dim, c) | _linear(f"{block}.mlp.2", c, config.mlp_dim)
    return shapes


def vae_shapes(config: VAEConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the VAE's tensors (structure of `WanVAE_` in Wan 2.1, `wan/modules/vae.py`)."""
    z, widths = config.z_dim, [config.dim * mult for mult in config.dim_mult]
    top = widths[-1]
    shapes = _linear("encoder.conv1", config.dim, 3, 3, 3, 3)
    index, width = 0, config.dim
    for level, out in enumerate(widths):
        for _ in range(config.res_blocks):
            shapes |= _res_block(f"encoder.downsamples.{index}", width, out)
            index, width = index + 1, out
        if level < len(widths) - 1:
            shapes |= _linear(f"encoder.downsamples.{index}.resample.1", out, out, 3, 3)
            if config.temporal_downsample[level]:
                shapes |= _linear(f"encoder.downsamples.{index}.time_conv", out, out, 3, 1, 1)
            index += 1
    shapes |= _vae_middle("encoder.middle", top) | {"encoder.head.0.gamma": (top, 1, 1, 1)}
    shapes |= _linear("encoder.head.2", 2 * z, top, 3, 3, 3)
    shapes |= _linear("conv1", 2 * z, 2 * z, 1, 1, 1) | _linear("conv2", z, z, 1, 1, 1)
    shapes |= _linear("decoder.conv1", top, z, 3, 3, 3) | _vae_middle("decoder.middle", top)
    index, width = 0, top
    for level, out in enumerate(reversed(widths)):
        for _ in range(config.res_blocks + 1):
            shapes |= _res_block(f"decoder.upsamples.{index}", width, out)
            index, width = index + 1, out
        if level < len(widths) - 1:
            shapes |= _linear(f"decoder.upsamples.{index}.resample.1", out // 2, out, 3, 3)
            if config.temporal_downsample[-1 - level]:
                shapes |= _linear(f"decoder.upsamples.{index}.time_conv", 2 * out, out, 3, 1, 1)
            index, width = index + 1, out // 2
    shapes["decoder.head.0.gamma"] = (config.dim, 1, 1, 1)
    return shapes | _linear("decoder.head.2", 3, config.dim, 3, 3, 3)


def check_shapes(shapes: Shapes, expected: Shapes, what: str) -> None:
    """Raise InputError that names wrong, missing or unknown tensors of `what` (the first few, and their number)."""
    problems = []
    for name, want in expected.items():
        if name not in shapes:
            problems.append(f"{name} is missing (expected {list(want)})")
        elif tuple(shapes[name]) != tuple(want):
            problems.append(f"{name} is {list(shapes[name])} (expected {list(want)})")
    problems += [f"{name} {list(shape)} is unknown here" for name, shape in shapes.items() if name not in expected]
    if problems:
        more = len(problems) - _LISTED_PROBLEMS
        listed = "; ".join(problems[:_LISTED_PROBLEMS]) + (f"; and {more} more" if more > 0 else "")
        count = f"{len(problems)} tensor{'s do' if len(problems) > 1 else ' does'} not fit"
        raise InputError(f"{what}: {count}: {listed}. Give a file of a SCAIL-2 checkpoint.")


def _linear(name: str, out: int, *rest: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, *rest), f"{name}.bias": (out,)}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _res_block(name: str, width: int, out: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}.residual.0.gamma": (width, 1, 1, 1)}
    shapes |= _linear(f"{name}.residual.2", out, width, 3, 3, 3) | {f"{name}.residual.3.gamma": (out, 1, 1, 1)}
    shapes |= _linear(f"{name}.residual.6", out, out, 3, 3, 3)
    return shapes | (_linear(f"{name}.shortcut", out, width, 1, 1, 1) if width != out else {})


def _vae_middle(name: str, width: int) -> dict[str, tuple[int, ...]]:
    shapes = _res_block(f"{name}.0", width, width) | {f"{name}.1.norm.gamma": (width, 1, 1)}
    shapes |= _linear(f"{name}.1.to_qkv", 3 * width, width, 1, 1) | _linear(f"{name}.1.proj", width, width, 1, 1)
    return shapes | _res_block(f"{name}.2", width, width)


def _vote(shapes: Shapes, what: str, votes: Votes, default: int | None = None) -> int:
    """Return the size that most tensors of `votes` show. If none exists: `default`, or raise InputError."""
    ballots: Counter[int] = Counter()
    for pattern, axis in votes:
        for name in _matching(shapes, pattern):
            if axis < len(shapes[name]):
                ballots[shapes[name][axis]] += 1
    if ballots:
        return ballots.most_common(1)[0][0]
    if default is not None:
        return default
    names = ", ".join(sorted({pattern.replace("*", "N") for pattern, _ in votes}))
    raise InputError(f"The {what} has no tensor that shows one of its sizes ({names}). Give a complete file.")


def _matching(shapes: Shapes, pattern: str) -> Iterable[str]:
    if "*" not in pattern:
        return [pattern] if pattern in shapes else []
    regex = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
    return [name for name in shapes if regex.fullmatch(name)]


def _count(shapes: Shapes, what: str, pattern: str) -> int:
    """Return the number of blocks: the highest number in the names, plus one."""
    numbers = [int(match.group(1)) for name in shapes if (match := re.match(pattern, name))]
    if not numbers:
        raise InputError(f"The {what} has no blocks (no tensor name begins with {pattern}). Give a complete file.")
    return max(numbers) + 1


def _settings(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """Parse the JSON object under the metadata key `config`; empty if there is none."""
    text = (metadata or {}).get("config", "{}")
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise InputError(
            f"The checkpoint's configuration is not JSON ({error}): {text[:80]!r}. Correct or remove it."
        ) from error
    if not isinstance(settings, dict):
        raise InputError(f"The checkpoint's configuration is not a JSON object: {text[:80]!r}. Correct or remove it.")
    return settings


def _number(settings: Mapping[str, Any], key: str, default: float) -> float:
    value = settings.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"The checkpoint's configuration gives {key} as {value!r}. Write a number.")
    return value


def _heads(what: str, dim: int, settings: Mapping[str, Any], width: int) -> int:
    """Return the number of attention heads: from the settings, else one per `width` channels."""
    width = int(_number(settings, "head_dim", width))
    whole = dim // width if width > 0 and dim % width == 0 else 0
    heads = int(_number(settings, "num_heads", whole))
    if heads < 1 or dim % heads or (dim // heads) % 2:
        raise InputError(
            f"The {what} is {dim} channels wide, which is not a multiple of its heads (num_heads "
            f"{settings.get('num_heads')}, head width {width}). Put num_heads or head_dim into a config.json beside "
            "the file."
        )
    return heads
