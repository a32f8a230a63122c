"""Tensors that a session keeps between segments and requests.

Per token layout: the transformer with its rotary table, token buffers and, on a GPU, its captured step. Per schedule:
the time embeddings. In addition, the buffers of the cross-attention keys and values, for one or two passes.
A clip of equal segments therefore captures one graph and loads `dit.time` once, and a second request with the same
layout captures no graph.
"""

from collections import OrderedDict
from collections.abc import Generator, Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from scail2_rt.engines.engine_set import EngineSet
from scail2_rt.runtime.core.geometry import Layout
from scail2_rt.runtime.pipeline.cuda_graph import GraphPool
from scail2_rt.runtime.pipeline.placement import Placement
from scail2_rt.runtime.pipeline.sharing import Ranks, Sharing
from scail2_rt.runtime.pipeline.transformer import BlockKV, Schedule, Transformer, context_kv
from scail2_rt.runtime.pipeline.vae import decode_unclamped

LAYOUTS = 3  # token buffers of 48,832 tokens of the 14B model take 0.2 GiB; captured steps share their memory
SCHEDULES = 8


class Constants:
    """The constants of one set of engines. `graphs_recorded` counts cache misses.

    ranks: the ranks that share the work, None for a single process."""

    def __init__(self, engines: EngineSet, ranks: Ranks | None = None) -> None:
        self.engines, self.ranks = engines, ranks
        self._sharing: Sharing | None = None
        self._graphs_recorded = 0
        self._pool = GraphPool()
        self._transformers: OrderedDict[Layout, Transformer] = OrderedDict()
        self._schedule = lru_cache(SCHEDULES)(partial(Schedule.of, engines))
        self._contexts: list[BlockKV] | None = None

    @property
    def graphs_recorded(self) -> int:
        return self._graphs_recorded + self._pool.recorded

    def contexts(self, texts: Sequence[Tensor], clip: Tensor) -> list[BlockKV]:
        """Compute cross-attention keys and values for texts [n, text_dim] and image [257, clip_dim].

        They are valid until the next call. If passes are divided, only this rank's passes are returned."""
        sharing = None if self.ranks is None else self.ranks.sharing(len(texts))
        mine, peers = (texts, None) if sharing is None else (sharing.mine(texts), sharing.rows)
        if self._contexts is not None and (len(self._contexts) != len(mine) or self._sharing != sharing):
            self.drop_transformers()  # their captured steps read the old buffers
            self._contexts = None
        self._sharing = sharing
        self._contexts = context_kv(self.engines, mine, clip, self._contexts, peers)
        if self.engines.device.type == "cuda":
            torch.cuda.empty_cache()  # block weights would fill the freed blocks only in part
        return self._contexts

    def transformer(self, layout: Layout, contexts: list[BlockKV]) -> Transformer:
        """Return the transformer of a layout over the result of `contexts`, from the cache if possible."""
        found = self._transformers.pop(layout, None)
        if found is None or found.contexts is not contexts:
            found = self._made(layout, contexts, self._pool, self._sharing)
        self._transformers[layout] = found
        while len(self._transformers) > LAYOUTS:
            self._transformers.popitem(last=False)
        return found

    def _made(self, layout: Layout, contexts: list[BlockKV], pool: GraphPool, sharing: Sharing | None) -> Transformer:
        return Transformer(self.engines, layout, contexts, pool, sharing)

    def schedule(self, timesteps: Sequence[float]) -> Schedule:
        """Return the time embeddings of these timesteps, from the cache if possible."""
        return self._schedule(tuple(float(t) for t in timesteps))

    def stages_of_contexts(self, placement: Placement | None) -> list[str]:
        """Return the stages of `contexts` whose weights may be loaded while references are encoded, as many as the
        placement has room for; none without a placement or with several ranks."""
        if placement is None or self.ranks is not None:
            return []
        return [f"dit.blocks.{i}.context_kv" for i in range(placement.contexts_ahead(torch.cuda.memory_reserved()))]

    def begin_segment(self, placement: Placement | None) -> None:
        """Prefetch the resident weights while the driving clip is encoded."""
        if placement is not None:
            self.engines.prefetch(placement.resident)

    def decode(self, latent: Tensor) -> Generator[Tensor, None, None]:
        """Decode a normalised latent [16, F, h, w] → unclamped pixels [3, 1, H, W], then [3, 4, H, W] each."""
        return decode_unclamped(self.engines, latent)

    def make_room(self, placement: Placement | None) -> None:
        """Free memory of the transformer for the VAE, as far as the placement requires it."""
        if placement is not None and placement.drops_blocks:
            self.engines.release("dit.blocks.")
        if placement is not None and not placement.keeps_graphs:
            self.drop_transformers()
            torch.cuda.empty_cache()

    def drop_transformers(self) -> None:
        """Free token buffers and captured steps."""
        self._transformers.clear()
        self._graphs_recorded += self._pool.recorded
        self._pool = GraphPool()

    def drop(self) -> None:
        """Free everything."""
        self.drop_transformers()
        self._schedule.cache_clear()
        self._contexts = None
