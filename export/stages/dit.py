"""The transformer cut into token-wise engine stages.

The runtime runs self-attention between `qkv` and `mid`, and cross-attention between `mid` and `ffn`. The stages work on
single rows, so that one engine serves every resolution, length and number of references, in chunks of any size. The
residual stream x is fp32 in every stage; `mod` holds the block's six modulation rows.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scail2_rt.export.models.config import DiTConfig
from scail2_rt.export.models.precision import FP8_ACCUMULATION, Numerics
from scail2_rt.export.stages.layers import Linear, Norm
from scail2_rt.export.stages.spec import ROWS, Dim, Specs, StageDefinition, TensorSpec
from scail2_rt.kernels.rows.ops import (
    gate_residual,
    gelu,
    layer_norm,
    modulation,
    norm_modulate,
    norm_rows,
    residual_norm,
    rms_norm,
    rms_norm_rows,
)

IMG_EMB_EPS = 1e-5


class Embed(nn.Module):
    """Embeds patches as tokens: latent patches by the video or the driving embedding, plus the mask embedding.

    latent [rows, 80], mask [rows, 112], driving [rows, 1] (1 for driving rows, else 0) → fp32 [rows, C]."""

    def __init__(self, config: DiTConfig, numerics: Numerics) -> None:
        super().__init__()
        self.patch = Linear(config.in_channels * 4, config.dim, numerics)
        self.pose = Linear(config.in_channels * 4, config.dim, numerics)
        self.mask = Linear(config.mask_channels * 4, config.dim, numerics)

    def forward(self, latent: Tensor, mask: Tensor, driving: Tensor) -> Tensor:
        driving = driving.float()
        tokens = self.patch(latent).float() * (1 - driving) + self.pose(latent).float() * driving
        return tokens + self.mask(mask).float()


class Time(nn.Module):
    """Maps sinusoids [rows, freq_dim] to the time embedding e [rows, C] and six modulation rows [rows, 6·C]; fp32."""

    def __init__(self, config: DiTConfig, numerics: Numerics) -> None:
        super().__init__()
        self.embedding_0 = Linear(config.freq_dim, config.dim, numerics)
        self.embedding_2 = Linear(config.dim, config.dim, numerics)
        self.projection = Linear(config.dim, 6 * config.dim, numerics)

    def forward(self, sinusoid: Tensor) -> tuple[Tensor, Tensor]:
        e = self.embedding_2(F.silu(self.embedding_0(sinusoid)))
        return e, self.projection(F.silu(e))


class Context(nn.Module):
    """Maps text [t, text_dim] and CLIP features [i, clip_dim] to the cross-attention contexts [t, C] and [i, C]."""

    def __init__(self, config: DiTConfig, numerics: Numerics) -> None:
        super().__init__()
        self.compute = numerics.compute
        self.text_0 = Linear(config.text_dim, config.dim, numerics)
        self.text_2 = Linear(config.dim, config.dim, numerics)
        self.clip_norm_0 = Norm(config.clip_dim, bias=True)
        self.clip_1 = Linear(config.clip_dim, config.clip_dim, numerics)
        self.clip_3 = Linear(config.clip_dim, config.dim, numerics)
        self.clip_norm_4 = Norm(config.dim, bias=True)

    def forward(self, text: Tensor, clip: Tensor) -> tuple[Tensor, Tensor]:
        text = self.text_2(gelu(self.text_0(text)))
        clip = layer_norm(clip, IMG_EMB_EPS, self.clip_norm_0.weight, self.clip_norm_0.bias)
        clip = self.clip_3(F.gelu(self.clip_1(clip).float()))
        clip = layer_norm(clip, IMG_EMB_EPS, self.clip_norm_4.weight, self.clip_norm_4.bias)
        return text, clip.to(self.compute)


class ContextKV(nn.Module):
    """Maps contexts [n, C] to one block's cross-attention keys and values [n, 2·C] as k | v, keys RMS-normed."""

    def __init__(self, config: DiTConfig, numerics: Numerics) -> None:
        super().__init__()
        self.eps = config.eps
        self.text = Linear(config.dim, 2 * config.dim, numerics)
        self.image = Linear(config.dim, 2 * config.dim, numerics)
        self.norm_k = Norm(config.dim)
        self.norm_k_img = Norm(config.dim)

    def forward(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        return self._normed(self.text(text), self.norm_k), self._normed(self.image(image), self.norm_k_img)

    def _normed(self, kv: Tensor, norm: Norm) -> Tensor:
        k, v = kv.chunk(2, dim=-1)
        return torch.cat([rms_norm(k, norm.weight, self.eps).to(kv.dtype), v], dim=-1)


class QKV(nn.Module):
    """LayerNorm, modulation, and projection of x fp32 [rows, C] to q | k | v [rows, 3·C]."""

    def __init__(self, config: DiTConfig, numerics: Numerics) -> None:
        super().__init__()
        self.eps = config.eps
        self.linear = Linear(config.dim, 3 * config.dim, numerics, accumulation=FP8_ACCUMULATION["qkv.linear"])

    def forward(self, x: Tensor, mod: Tensor, out: Tensor | None = None) -> Tensor:
        return self.linear.project(norm_rows(x, modulation(mod[0], mod[1]), self.eps, self.linear.form), out)


class Mid(nn.Module):
    """Self-attention's output projection, gate and residual; then LN3 and the normed query of cross-attention.

    `out`: destinations of x and q; that of x may be x."""

    def __init__(self, config: DiTConfig, numerics: Numerics) -> None:
        super().__init__()
        self.eps = config.eps
        self.o = Linear(config.dim, config.dim, numerics, accumulation=FP8_ACCUMULATION["mid.o"])
        self.norm3 = Norm(config.dim, bias=True)
        self.q = Linear(config.dim, config.dim, numerics, accumulation=FP8_ACCUMULATION["mid.q"])
        self.norm_q = Norm(config.dim)

    def forward(
        self, x: Tensor, attention: Tensor, mod: Tensor, out: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        x_out, q_out = out or (None, None)
        x, rows = residual_norm(x, self.o(attention), mod[2], self.norm3.affine, self.eps, self.q.form, x_out)
        q = self.q.project(rows, q_out)
        return x, rms_norm_rows(q, self.norm_q.weight, self.eps, q_out)


class FFN(nn.Module):
    """Cross-attention's output projection and residual; then LayerNorm, modulation, feed-forward, gate, residual.

    `out`: destination of x, may be x. The widest intermediate is freed as soon as it is activated."""

    def __init__(self, config: DiTConfig, numerics: Numerics) -> None:
        super().__init__()
        self.eps = config.eps
        self.o = Linear(config.dim, config.dim, numerics, accumulation=FP8_ACCUMULATION["ffn.o"])
        self.up = Linear(config.dim, config.ffn_dim, numerics, accumulation=FP8_ACCUMULATION["ffn.up"])
        self.down = Linear(config.ffn_dim, config.dim, numerics, accumulation=FP8_ACCUMULATION["ffn.down"])

    def forward(self, x: Tensor, attention: Tensor, mod: Tensor, out: Tensor | None = None) -> Tensor:
        affine = modulation(mod[3], mod[4])
        x, rows = residual_norm(x, self.o(attention), None, affine, self.eps, self.up.form, out)
        rows = self.up.project_gelu(rows, self.down.form)
        return gate_residual(x, self.down.project(rows), mod[5], out)


class Head(nn.Module):
    """Maps tokens fp32 [rows, C] to velocity patches [rows, 64]; fp32. `mod` is [2, C]: shift, scale."""

    def __init__(self, config: DiTConfig, numerics: Numerics) -> None:
        super().__init__()
        self.eps = config.eps
        self.linear = Linear(config.dim, config.out_channels * 4, numerics)

    def forward(self, x: Tensor, mod: Tensor) -> Tensor:
        return self.linear(norm_modulate(x, mod[0], mod[1], self.eps, torch.float32))


def _linear(parameter_name: str, *sources: str) -> dict[str, tuple[str, ...]]:
    """Return the sources of one linear's weight and bias: one or several stacked checkpoint linears."""
    return {f"{parameter_name}.{kind}": tuple(f"{source}.{kind}" for source in sources) for kind in ("weight", "bias")}


# name → (in the compute type? else fp32, dimensions)
Tensors = dict[str, tuple[bool, tuple[Dim, ...]]]


def _specs(numerics: Numerics, inputs: Tensors, outputs: Tensors) -> Specs:
    def make(tensors: Tensors) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(name, numerics.compute if compute else torch.float32, dims)
            for name, (compute, dims) in tensors.items()
        )

    return make(inputs), make(outputs)


def _stage(
    name: str,
    module: Callable[[DiTConfig, Numerics], nn.Module],
    config: DiTConfig,
    inputs: Tensors,
    outputs: Tensors,
    weights: dict[str, tuple[str, ...]],
) -> StageDefinition:
    """Define a stage. Stages of different blocks with the same last name form one family."""
    parts = name.split(".")
    family = f"dit.blocks.{parts[-1]}" if len(parts) == 4 else name
    return StageDefinition(
        name, partial(module, config), partial(_specs, inputs=inputs, outputs=outputs), weights, family
    )


def _block(config: DiTConfig, index: int) -> list[StageDefinition]:
    c, block, stage = config.dim, f"blocks.{index}", f"dit.blocks.{index}"
    self_attn, cross = f"{block}.self_attn", f"{block}.cross_attn"
    rows, x, mod = (True, (ROWS, c)), (False, (ROWS, c)), (False, (6, c))
    kv_weights = {
        **_linear("text", f"{cross}.k", f"{cross}.v"),
        **_linear("image", f"{cross}.k_img", f"{cross}.v_img"),
        "norm_k.weight": (f"{cross}.norm_k.weight",),
        "norm_k_img.weight": (f"{cross}.norm_k_img.weight",),
    }
    mid_weights = {
        **_linear("o", f"{self_attn}.o"),
        **_linear("norm3", f"{block}.norm3"),
        **_linear("q", f"{cross}.q"),
        "norm_q.weight": (f"{cross}.norm_q.weight",),
    }
    ffn_weights = {
        **_linear("o", f"{cross}.o"),
        **_linear("up", f"{block}.ffn.0"),
        **_linear("down", f"{block}.ffn.2"),
    }
    contexts: Tensors = {"text": (True, ("t", c)), "image": (True, ("i", c))}
    kv: Tensors = {"text_kv": (True, ("t", 2 * c)), "image_kv": (True, ("i", 2 * c))}
    qkv: Tensors = {"qkv": (True, (ROWS, 3 * c))}
    qkv_weights = _linear("linear", f"{self_attn}.q", f"{self_attn}.k", f"{self_attn}.v")
    attended: Tensors = {"x": x, "attention": rows, "mod": mod}
    return [
        _stage(f"{stage}.context_kv", ContextKV, config, contexts, kv, kv_weights),
        _stage(f"{stage}.qkv", QKV, config, {"x": x, "mod": mod}, qkv, qkv_weights),
        _stage(f"{stage}.mid", Mid, config, attended, {"x_out": x, "q": rows}, mid_weights),
        _stage(f"{stage}.ffn", FFN, config, attended, {"x_out": x}, ffn_weights),
    ]


def _context(config: DiTConfig) -> StageDefinition:
    inputs: Tensors = {"text": (True, ("t", config.text_dim)), "clip": (True, ("i", config.clip_dim))}
    outputs: Tensors = {"text_context": (True, ("t", config.dim)), "image_context": (True, ("i", config.dim))}
    weights = {
        **_linear("text_0", "text_embedding.0"),
        **_linear("text_2", "text_embedding.2"),
        **_linear("clip_norm_0", "img_emb.proj.0"),
        **_linear("clip_1", "img_emb.proj.1"),
        **_linear("clip_3", "img_emb.proj.3"),
        **_linear("clip_norm_4", "img_emb.proj.4"),
    }
    return _stage("dit.context", Context, config, inputs, outputs, weights)


def _time(config: DiTConfig) -> StageDefinition:
    c = config.dim
    weights = {
        **_linear("embedding_0", "time_embedding.0"),
        **_linear("embedding_2", "time_embedding.2"),
        **_linear("projection", "time_projection.1"),
    }
    outputs: Tensors = {"e": (False, (ROWS, c)), "projection": (False, (ROWS, 6 * c))}
    return _stage("dit.time", Time, config, {"sinusoid": (False, (ROWS, config.freq_dim))}, outputs, weights)


def _embed(config: DiTConfig) -> StageDefinition:
    inputs: Tensors = {
        "latent": (True, (ROWS, config.in_channels * 4)),
        "mask": (True, (ROWS, config.mask_channels * 4)),
        "driving": (True, (ROWS, 1)),
    }
    weights = {
        **_linear("patch", "patch_embedding"),
        **_linear("pose", "patch_embedding_pose"),
        **_linear("mask", "patch_embedding_mask"),
    }
    return _stage("dit.embed", Embed, config, inputs, {"x": (False, (ROWS, config.dim))}, weights)


def _head(config: DiTConfig) -> StageDefinition:
    inputs: Tensors = {"x": (False, (ROWS, config.dim)), "mod": (False, (2, config.dim))}
    outputs: Tensors = {"out": (False, (ROWS, config.out_channels * 4))}
    return _stage("dit.head", Head, config, inputs, outputs, _linear("linear", "head.head"))


def definitions(config: DiTConfig) -> list[StageDefinition]:
    """Return all stages of the transformer, in the order in which a generation first needs them."""
    blocks = [stage for index in range(config.layers) for stage in _block(config, index)]
    return [_context(config), _time(config), _embed(config), *blocks, _head(config)]


def table_sources(config: DiTConfig) -> dict[str, str]:
    """Return runtime table → checkpoint tensor: the constants that the runtime needs between the stages."""
    tables = {"head.modulation": "head.modulation"}
    for i in range(config.layers):
        tables[f"blocks.{i}.modulation"] = f"blocks.{i}.modulation"
        tables[f"blocks.{i}.norm_q"] = f"blocks.{i}.self_attn.norm_q.weight"
        tables[f"blocks.{i}.norm_k"] = f"blocks.{i}.self_attn.norm_k.weight"
    return tables
