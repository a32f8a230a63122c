"""The denoising network over engine stages and kernels: what the model's forward pass is in this runtime.

What is constant over the denoising steps is computed once: reference and driving tokens, the rotary table, all time
embeddings, and every block's cross-attention keys and values (whose weights are then let go). A step embeds the noisy
video, runs the blocks, and returns one velocity per context; the passes of guidance share everything up to block 0's
cross-attention.

A `Transformer` belongs to a token layout and a number of passes, not to a segment: what a segment shows it is written
into buffers that stay where they are, so that a step that was recorded for one segment serves every later one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from scail2_rt.engines.engine_set import EngineSet
from scail2_rt.export.models.dit import patchify, sinusoid, unpatchify
from scail2_rt.kernels.attention.ops import cross_attention, prepare_qkv, self_attention
from scail2_rt.kernels.rope import rope_table
from scail2_rt.runtime.core.geometry import Layout
from scail2_rt.runtime.pipeline.cuda_graph import GraphPool, StepGraph

AHEAD = 4  # blocks whose context weights are on their way while one is used
BlockKV = list[tuple[Tensor, Tensor]]  # per block: text k|v [512, 2C], image k|v [257, 2C]


@dataclass(frozen=True, slots=True, eq=False)
class References:
    """What every segment of a generation shows the model: reference [16, 1, h, w], its mask [28, 1, h, w],
    additional_refs [16, N, h, w] and additional_masks [28, N, h, w], N ≥ 0."""

    reference: Tensor
    reference_mask: Tensor
    additional_refs: Tensor
    additional_masks: Tensor


@dataclass(frozen=True, slots=True)
class Schedule:
    """What the model knows of each denoising step: time fp32 [n, C] and its projection to modulation, fp32
    [n, 6, C]."""

    time: Tensor
    modulation: Tensor

    @classmethod
    def of(cls, engines: EngineSet, timesteps: Sequence[float]) -> "Schedule":
        """The time embeddings of these timesteps; the weights leave memory."""
        assert engines.config.dit is not None
        times = sinusoid(torch.tensor(timesteps, dtype=torch.float64), engines.config.dit.freq_dim)
        time, projection = engines.run("dit.time", times.to(engines.device))
        engines.release("dit.time")  # fp32, and all its results are here
        return cls(time, projection.view(len(timesteps), 6, engines.config.dit.dim))


def context_kv(
    engines: EngineSet, contexts: Sequence[Tensor], clip: Tensor, into: list[BlockKV] | None = None
) -> list[BlockKV]:
    """Cross-attention keys and values of every block for each text context.

    contexts: text encodings [n ≤ 512, text_dim], zero-padded to 512 rows here; clip [257, clip_dim]. `into`: the result
    for another prompt or image, as many contexts: it is overwritten in place and returned."""
    assert engines.config.dit is not None
    config = engines.config.dit
    compute = engines.compute_dtype("dit.context")
    embedded = []
    for text in contexts:
        padded = F.pad(text, (0, 0, 0, config.text_len - text.shape[0]))
        embedded.append(
            engines.run("dit.context", padded.to(engines.device, compute), clip.to(engines.device, compute))
        )
    engines.release("dit.context")
    result: list[BlockKV] = into if into is not None else [[] for _ in contexts]
    for i in range(config.layers):
        engines.prefetch(f"dit.blocks.{j}.context_kv" for j in range(i, min(i + AHEAD, config.layers)))
        for blocks, (text, image) in zip(result, embedded, strict=True):
            text_kv, image_kv = engines.run(f"dit.blocks.{i}.context_kv", text, image)
            if into is None:  # a copy, which may be written to later, whatever mode the engines computed it in
                blocks.append((text_kv.clone(), image_kv.clone()))
            else:
                blocks[i][0].copy_(text_kv)
                blocks[i][1].copy_(image_kv)
        engines.release(f"dit.blocks.{i}.context_kv")
    return result


class Transformer:
    """The denoising network of one token layout. `show_references` and `show_driving` say what it sees beside the noisy
    video; then `velocities` is all that the denoising loop calls.

    contexts: one BlockKV per guidance pass, read where they lie. `pool`: the memory of recorded steps, where the
    engines allow to record them."""

    def __init__(
        self, engines: EngineSet, layout: Layout, contexts: Sequence[BlockKV], pool: GraphPool | None = None
    ) -> None:
        assert engines.config.dit is not None
        self.engines, self.layout, self.contexts, self.config = engines, layout, contexts, engines.config.dit
        self.embed_dtype = engines.compute_dtype("dit.embed")
        self.block_dtype = engines.compute_dtype("dit.blocks.0.mid")
        grid_height, grid_width = layout.height // 2, layout.width // 2
        self.rope = rope_table(
            layout.frames, grid_height, grid_width, self.config.head_dim, layout.additional_refs, layout.replace
        ).to(engines.device)
        tables = engines.tables
        self.block_modulation = torch.stack([tables[f"blocks.{i}.modulation"] for i in range(self.config.layers)])
        self._references = torch.empty(layout.reference_tokens, self.config.dim, device=engines.device)
        self._driving = torch.empty(layout.driving_tokens, self.config.dim, device=engines.device)
        masks = layout.video_tokens, self.config.mask_channels * 4  # of 2×2 latents
        self._video_mask = torch.zeros(masks, dtype=self.embed_dtype, device=engines.device)
        self._shown: References | None = None
        self._graph = StepGraph(pool) if pool is not None and engines.cuda_graphs else None

    def show_references(self, shown: References) -> None:
        """Embed these references, unless they are those that were shown last.

        `reference_mask` may be [28, 1+F, h, w], to give the video frames a mask too."""
        if shown is self._shown:
            return
        latents = torch.cat([shown.additional_refs, shown.reference], dim=1)
        masks = torch.cat([shown.additional_masks, shown.reference_mask[:, :1]], dim=1)
        self._references.copy_(self._embed(self._with_history(latents, 1.0), masks))
        video_mask = shown.reference_mask[:, 1:]
        self._video_mask.zero_() if not video_mask.shape[1] else self._video_mask.copy_(patchify(video_mask))
        self._shown = shown

    def show_driving(self, driving: Tensor, driving_mask: Tensor) -> None:
        """Embed a segment's driving clip [16, F, h/2, w/2] and its mask [28, F, h/2, w/2]."""
        self._driving.copy_(self._embed(self._with_history(driving, 1.0), driving_mask, driving=True))

    def velocities(self, latent: Tensor, history_mask: Tensor, schedule: Schedule, step: int) -> list[Tensor]:
        """latent fp32 [16, F, h, w], history_mask [4, F, h, w] → one fp32 velocity [16, F, h, w] per context."""
        inputs = torch.cat([latent, history_mask]), schedule.modulation[step], schedule.time[step]
        return self._network(*inputs) if self._graph is None else self._graph.call(self._network, *inputs)

    def _network(self, video: Tensor, modulation: Tensor, time: Tensor) -> list[Tensor]:
        """video fp32 [20, F, h, w], modulation fp32 [6, C], time fp32 [C]: a function of these tensors and of buffers
        that stay where they are, so that it can be captured. The residual stream is one buffer that the stages update
        in place; with several contexts each but the last continues from block 0 in a buffer of its own."""
        layout = self.layout
        mods = (self.block_modulation + modulation).unbind()
        x = torch.empty(layout.tokens, self.config.dim, device=self.engines.device)
        x[layout.references], x[layout.driving] = self._references, self._driving
        place = x[layout.video]
        tokens = self._embed_rows(self._rows(video), self._video_mask, out=place)
        if tokens is not place:  # an executor that does not write where it is told
            place.copy_(tokens)
        head = self.engines.tables["head.modulation"] + time
        shared_x, shared_q = self._attend(0, x, mods[0])
        result = []
        for number, kv in enumerate(self.contexts):
            last = number == len(self.contexts) - 1
            x, q = shared_x, shared_q
            if last:
                del shared_x, shared_q
            for i in range(self.config.layers):
                if i > 0:
                    x, q = self._attend(i, x, mods[i])
                attention = cross_attention(q, *kv[i], self.config.head_dim)
                into = x if i > 0 or last else torch.empty_like(x)
                (x,) = self.engines.run(f"dit.blocks.{i}.ffn", x, attention, mods[i], out=into)
                del q, attention  # the next block's qkv needs the room
            (rows,) = self.engines.run("dit.head", x[layout.video], head)
            result.append(unpatchify(rows, layout.frames, layout.height, layout.width))
        return result

    def _attend(self, i: int, x: Tensor, mod: Tensor) -> tuple[Tensor, Tensor]:
        """Block i up to its cross-attention query: x [L, C], updated in place where the executor can → x, q."""
        tables = self.engines.tables
        (qkv,) = self.engines.run(f"dit.blocks.{i}.qkv", x, mod)
        norms = tables[f"blocks.{i}.norm_q"], tables[f"blocks.{i}.norm_k"]
        prepared = prepare_qkv(qkv, *norms, self.rope, self.engines.attention)
        del qkv  # in 8 bit nothing refers to it any more, and attention needs the room
        attended = self_attention(prepared).to(self.block_dtype)  # 8 bit gives bf16, whatever the engines' type
        x, q = self.engines.run(f"dit.blocks.{i}.mid", x, attended, mod, out=x)
        return x, q

    def _with_history(self, latent: Tensor, value: float) -> Tensor:
        return torch.cat([latent, latent.new_full((self.config.history_channels, *latent.shape[1:]), value)])

    def _rows(self, latent: Tensor) -> Tensor:
        return patchify(latent).to(self.engines.device, self.embed_dtype)

    def _embed(self, latent: Tensor, mask: Tensor, driving: bool = False) -> Tensor:
        """latent [20, F, h, w] and mask [28, F, h, w] → tokens fp32 [L, C]."""
        return self._embed_rows(self._rows(latent), self._rows(mask), driving)

    def _embed_rows(self, rows: Tensor, masks: Tensor, driving: bool = False, out: Tensor | None = None) -> Tensor:
        """The same of patches: rows [L, 80] and masks [L, 112]. `out`: where the tokens may be written."""
        flag = rows.new_full((rows.shape[0], 1), float(driving))
        (tokens,) = self.engines.run("dit.embed", rows, masks, flag, out=out)
        return tokens
