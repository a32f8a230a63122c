"""The denoising network over engine stages and kernels: the model's forward pass in this runtime.

Everything constant over the denoising steps is computed once: reference and driving tokens, the rotary table, all time
embeddings, and every block's cross-attention keys and values (whose weights are then released). A step embeds the noisy
video, runs the blocks, and returns one velocity per context; the guidance passes share all work up to block 0's
cross-attention.

A `Transformer` belongs to a token layout and a number of passes, not to a segment: a segment's inputs are written into
buffers with fixed addresses, so that a step captured for one segment serves all later ones.

Several ranks may share the work (`pipeline.sharing`). Each then holds a part of the rows, always at the same positions
of the sequence; arguments and results are complete on every rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from scail2_rt.engines.engine_set import EngineSet
from scail2_rt.export.models.dit import patchify, sinusoid, unpatchify
from scail2_rt.kernels.attention.ops import (
    HeadExchange,
    cross_attention,
    prepare_qkv,
    self_attention,
    shared_attention,
)
from scail2_rt.kernels.peers import Peers
from scail2_rt.kernels.rope import rope_table
from scail2_rt.runtime.core.geometry import Layout
from scail2_rt.runtime.pipeline.cuda_graph import GraphPool, StepGraph
from scail2_rt.runtime.pipeline.sharing import Sharing

AHEAD = 4  # blocks whose context weights are prefetched beyond the one in use
BlockKV = list[tuple[Tensor, Tensor]]  # per block: text k|v [512, 2C], image k|v [257, 2C]


@dataclass(frozen=True, slots=True, eq=False)
class References:
    """The references shown to the model in every segment: reference [16, 1, h, w], its mask [28, 1, h, w],
    additional_refs [16, N, h, w] and additional_masks [28, N, h, w], N ≥ 0."""

    reference: Tensor
    reference_mask: Tensor
    additional_refs: Tensor
    additional_masks: Tensor


@dataclass(frozen=True, slots=True)
class Schedule:
    """The model's time inputs per denoising step: time fp32 [n, C] and its projection to modulation, fp32 [n, 6, C]."""

    time: Tensor
    modulation: Tensor

    @classmethod
    def of(cls, engines: EngineSet, timesteps: Sequence[float]) -> "Schedule":
        """Compute the time embeddings of these timesteps and release the weights."""
        assert engines.config.dit is not None
        times = sinusoid(torch.tensor(timesteps, dtype=torch.float64), engines.config.dit.freq_dim)
        time, projection = engines.run("dit.time", times.to(engines.device))
        engines.release("dit.time")  # fp32, and all its results have been computed
        return cls(time, projection.view(len(timesteps), 6, engines.config.dit.dim))


def context_kv(
    engines: EngineSet,
    contexts: Sequence[Tensor],
    clip: Tensor,
    into: list[BlockKV] | None = None,
    peers: Peers | None = None,
) -> list[BlockKV]:
    """Compute cross-attention keys and values of every block for each text context.

    contexts: text encodings [n ≤ 512, text_dim], zero-padded to 512 rows here; clip [257, clip_dim]. `into`: an earlier
    result with as many contexts, overwritten in place and returned. `peers`: ranks that make the same call; each
    computes the same number of blocks, and one gather gives all blocks to every rank."""
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
    each = config.layers if peers is None else -(-config.layers // peers.size)
    first = 0 if peers is None else peers.rank * each
    blocks = range(first, min(first + each, config.layers))
    result: list[BlockKV] = into if into is not None else [[] for _ in contexts]
    made: list[BlockKV] = [[] for _ in contexts]
    for i in blocks:
        engines.prefetch(f"dit.blocks.{j}.context_kv" for j in range(i, min(i + AHEAD, blocks.stop)))
        for context, (text, image) in enumerate(embedded):
            text_kv, image_kv = engines.run(f"dit.blocks.{i}.context_kv", text, image)
            if peers is not None:
                made[context].append((text_kv, image_kv))
            else:
                _keep(result[context], i, text_kv, image_kv)
        engines.release(f"dit.blocks.{i}.context_kv")
    if peers is not None:
        shape = each, config.text_len + len(clip), 2 * config.dim
        padding = torch.zeros(shape, dtype=engines.compute_dtype("dit.blocks.0.context_kv"), device=engines.device)
        for kv, own in zip(result, made, strict=True):
            for i, rows in enumerate(_of_all_blocks(own, padding, peers)[: config.layers]):
                _keep(kv, i, *rows.split([config.text_len, len(clip)]))
    return result


def release_prefetched(engines: EngineSet) -> None:
    """Drop weights for references and contexts (CLIP, cross-attention keys and values) that were prefetched and not
    used."""
    assert engines.config.dit is not None
    for i in range(engines.config.dit.layers):
        engines.release(f"dit.blocks.{i}.context_kv")
    engines.release("clip")


def _keep(kv: BlockKV, i: int, text: Tensor, image: Tensor) -> None:
    """Write block i's keys and values into kv, or append a copy if kv has no such block yet."""
    if i == len(kv):
        kv.append((text.clone(), image.clone()))
    else:
        kv[i][0].copy_(text)
        kv[i][1].copy_(image)


def _of_all_blocks(own: BlockKV, padding: Tensor, peers: Peers) -> Tensor:
    """Gather the blocks of every rank → [blocks and padding, rows, 2C]; `padding` fills ranks with fewer."""
    rows = torch.stack([torch.cat(pair) for pair in own]) if own else padding[:0]
    return peers.gather(torch.cat([rows, padding[len(own) :]])).flatten(0, 1)


class Transformer:
    """The denoising network of one token layout. `show_references` and `show_driving` set its inputs beside the noisy
    video; the denoising loop then calls `velocities` only.

    contexts: one BlockKV per guidance pass, not copied; if passes are divided, those of this rank. `pool`: memory of
    captured steps, used if the engines allow CUDA graphs. `sharing`: the other ranks, None for a single process."""

    def __init__(
        self,
        engines: EngineSet,
        layout: Layout,
        contexts: Sequence[BlockKV],
        pool: GraphPool | None = None,
        sharing: Sharing | None = None,
    ) -> None:
        assert engines.config.dit is not None
        self.engines, self.layout, self.contexts, self.config = engines, layout, contexts, engines.config.dit
        self.embed_dtype = engines.compute_dtype("dit.embed")
        self.block_dtype = engines.compute_dtype("dit.blocks.0.mid")
        grid_height, grid_width = layout.height // 2, layout.width // 2
        table = rope_table(
            layout.frames, grid_height, grid_width, self.config.head_dim, layout.additional_refs, layout.replace
        )
        self.sharing = sharing
        self.share = None if sharing is None else sharing.share(layout.tokens, engines.attention.eight_bit)
        self.rope = (table if self.share is None else self.share.rope(table)).to(engines.device)
        tables = engines.tables
        self.block_modulation = torch.stack([tables[f"blocks.{i}.modulation"] for i in range(self.config.layers)])
        references, driving, video = (self._held(part)[0] for part in (layout.references, layout.driving, layout.video))
        self._references, self._driving = (
            torch.empty(rows.stop - rows.start, self.config.dim, device=engines.device)
            for rows in (references, driving)
        )
        masks = video.stop - video.start, self.config.mask_channels * 4  # for 2×2 latents
        self._video_mask = torch.zeros(masks, dtype=self.embed_dtype, device=engines.device)
        self._shown: References | None = None
        self._graph = StepGraph(pool) if pool is not None and engines.cuda_graphs else None

    def show_references(self, shown: References) -> None:
        """Embed these references, unless they are already shown.

        `reference_mask` may be [28, 1+F, h, w], to give the video frames a mask too."""
        if shown is self._shown:
            return
        latents = torch.cat([shown.additional_refs, shown.reference], dim=1)
        masks = torch.cat([shown.additional_masks, shown.reference_mask[:, :1]], dim=1)
        self._embed(self._with_history(latents, 1.0), masks, self.layout.references, self._references)
        video_mask = shown.reference_mask[:, 1:]
        if video_mask.shape[1]:
            self._video_mask.copy_(patchify(video_mask)[self._held(self.layout.video)[1]])
        else:
            self._video_mask.zero_()
        self._shown = shown

    def show_driving(self, driving: Tensor, driving_mask: Tensor) -> None:
        """Embed a segment's driving latent [16, F, h/2, w/2] and its mask [28, F, h/2, w/2]."""
        self._embed(self._with_history(driving, 1.0), driving_mask, self.layout.driving, self._driving)

    def velocities(self, latent: Tensor, history_mask: Tensor, schedule: Schedule, step: int) -> list[Tensor]:
        """Predict from latent fp32 [16, F, h, w] and history_mask [4, F, h, w]: fp32 [16, F, h, w] per context."""
        inputs = torch.cat([latent, history_mask]), schedule.modulation[step], schedule.time[step]
        return self._network(*inputs) if self._graph is None else self._graph.call(self._network, *inputs)

    def drop_recording(self) -> None:
        """Drop the captured step; the next step is captured again."""
        if self._graph is not None:
            self._graph = StepGraph(self._graph.pool)

    def _network(self, video: Tensor, modulation: Tensor, time: Tensor) -> list[Tensor]:
        """Run the network: video fp32 [20, F, h, w], modulation fp32 [6, C], time fp32 [C] → velocities.

        Reads only these tensors and buffers with fixed addresses, so that it can be captured. The residual stream is
        one buffer, updated in place by the stages; with several contexts, each but the last continues from block 0 in a
        separate buffer."""
        layout = self.layout
        mods = (self.block_modulation + modulation).unbind()
        exchange = None if self.share is None else HeadExchange(self.share)
        x = self._residual_stream()
        x[self._held(layout.references)[0]], x[self._held(layout.driving)[0]] = self._references, self._driving
        held, source = self._held(layout.video)
        place = x[held]
        tokens = self._embed_rows(self._rows(video)[source], self._video_mask, out=place)
        if tokens is not place:  # a backend that does not support `out`
            place.copy_(tokens)
        head = self.engines.tables["head.modulation"] + time
        shared_x, shared_q = self._attend(0, x, mods[0], exchange)
        result = []
        for number, kv in enumerate(self.contexts):
            last = number == len(self.contexts) - 1
            x, q = shared_x, shared_q
            if last:
                del shared_x, shared_q
            for i in range(self.config.layers):
                if i > 0:
                    x, q = self._attend(i, x, mods[i], exchange)
                attention = cross_attention(q, *kv[i], self.config.head_dim)
                into = x if i > 0 or last else torch.empty_like(x)
                (x,) = self.engines.run(f"dit.blocks.{i}.ffn", x, attention, mods[i], out=into)
                del q, attention  # free memory for the next block's qkv
            result.append(self._head(x, head))
        if self.sharing is not None:
            result = self.sharing.collect(result, slice(0, layout.tokens) if self.share is None else layout.video)
        return [unpatchify(rows, layout.frames, layout.height, layout.width) for rows in result]

    def _attend(self, i: int, x: Tensor, mod: Tensor, exchange: HeadExchange | None) -> tuple[Tensor, Tensor]:
        """Run block i up to its cross-attention query: x [L, C], updated in place if the backend can → x, q."""
        tables = self.engines.tables
        (qkv,) = self.engines.run(f"dit.blocks.{i}.qkv", x, mod)
        norms = tables[f"blocks.{i}.norm_q"], tables[f"blocks.{i}.norm_k"]
        prepared = prepare_qkv(qkv, *norms, self.rope, self.engines.attention, self.share)
        del qkv  # in 8 bits nothing refers to it any more, and attention needs the memory
        if exchange is None:
            attended = self_attention(prepared)
        else:
            attended = shared_attention(prepared, exchange, self.config.head_dim)
        attended = attended.to(self.block_dtype)  # 8-bit attention returns bf16, whatever the engines' type
        x, q = self.engines.run(f"dit.blocks.{i}.mid", x, attended, mod, out=x)
        return x, q

    def _head(self, x: Tensor, head: Tensor) -> Tensor:
        """Project x [L, C] → the video's rows [Lv, 64]; with shared rows, all rows here [R, 64], others zero."""
        held, _ = self._held(self.layout.video)
        if self.share is None:
            return self.engines.run("dit.head", x[held], head)[0]
        placed = x.new_zeros(len(x), 4 * self.config.out_channels)
        if held.start < held.stop:
            placed[held] = self.engines.run("dit.head", x[held], head)[0]
        return placed

    def _held(self, part: slice) -> tuple[slice, slice]:
        """Intersect the sequence's rows `part` with this rank's: (slice of this rank's rows, slice of `part`)."""
        return (part, slice(0, part.stop - part.start)) if self.share is None else self.share.held(part)

    def _residual_stream(self) -> Tensor:
        """Allocate the residual stream; padding is zero."""
        if self.share is None:
            return torch.empty(self.layout.tokens, self.config.dim, device=self.engines.device)
        return torch.zeros(self.share.rows, self.config.dim, device=self.engines.device)

    def _with_history(self, latent: Tensor, value: float) -> Tensor:
        return torch.cat([latent, latent.new_full((self.config.history_channels, *latent.shape[1:]), value)])

    def _rows(self, latent: Tensor) -> Tensor:
        return patchify(latent).to(self.engines.device, self.embed_dtype)

    def _embed(self, latent: Tensor, mask: Tensor, part: slice, into: Tensor) -> None:
        """Embed latent [20, F, h, w] and mask [28, F, h, w] of a part of the sequence; writes this rank's tokens."""
        _, source = self._held(part)
        rows, masks = self._rows(latent)[source], self._rows(mask)[source]
        if len(into):
            into.copy_(self._embed_rows(rows, masks, driving=part == self.layout.driving))

    def _embed_rows(self, rows: Tensor, masks: Tensor, driving: bool = False, out: Tensor | None = None) -> Tensor:
        """Embed patches: rows [L, 80] and masks [L, 112] → [L, C]. `out`: the backend may write the tokens there."""
        if out is not None and not len(out):  # this rank has no row of this part
            return out
        flag = rows.new_full((rows.shape[0], 1), float(driving))
        (tokens,) = self.engines.run("dit.embed", rows, masks, flag, out=out)
        return tokens
