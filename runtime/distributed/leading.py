"""The leader's constants and transformers: each call runs on every rank of the team."""

import contextlib
from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from scail2_rt.engines.engine_set import EngineSet
from scail2_rt.runtime.core.geometry import Layout
from scail2_rt.runtime.distributed.decoding import SharedDecoding
from scail2_rt.runtime.distributed.team import Team
from scail2_rt.runtime.pipeline.constants import Constants
from scail2_rt.runtime.pipeline.cuda_graph import GraphPool
from scail2_rt.runtime.pipeline.placement import Placement
from scail2_rt.runtime.pipeline.sharing import Sharing
from scail2_rt.runtime.pipeline.transformer import BlockKV, References, Schedule, Transformer


class LeadingConstants(Constants):
    """`Constants` whose calls run on every rank of a team."""

    def __init__(self, engines: EngineSet, team: Team) -> None:
        super().__init__(engines, team)
        self.team = team

    def place(self, placement: Placement | None) -> None:
        """Make the other ranks place their weights as this rank has placed its weights."""
        with self.team.together("place", placement):
            pass

    def contexts(self, texts: Sequence[Tensor], clip: Tensor) -> list[BlockKV]:
        with self.team.together("contexts", [text.cpu() for text in texts], clip.cpu()):
            return super().contexts(texts, clip)

    def transformer(self, layout: Layout, contexts: list[BlockKV]) -> Transformer:
        with self.team.together("transformer", layout):
            return super().transformer(layout, contexts)

    def schedule(self, timesteps: Sequence[float]) -> Schedule:
        with self.team.together("schedule", tuple(float(t) for t in timesteps)):
            return super().schedule(timesteps)

    def begin_segment(self, placement: Placement | None) -> None:
        with self.team.together("begin_segment", placement):
            super().begin_segment(placement)

    def decode(self, latent: Tensor) -> Generator[Tensor, None, None]:
        """Decode frame by frame, each rank a strip of every frame, so that a run can end between frames."""
        if not self.engines.splits_pictures:
            yield from super().decode(latent)
            return
        latent = latent.contiguous()
        with self.team.together("decode", tuple(latent.shape)) as groups:
            shared = SharedDecoding(self.engines, groups.everyone, latent)
        with contextlib.closing(shared):
            for _ in range(latent.shape[1]):
                with self.team.together("decode_frame"):
                    pixels = shared.frame()
                yield pixels

    def make_room(self, placement: Placement | None) -> None:
        with self.team.together("make_room", placement):
            super().make_room(placement)

    def _made(self, layout: Layout, contexts: list[BlockKV], pool: GraphPool, sharing: Sharing | None) -> Transformer:
        return LeadingTransformer(self.engines, layout, contexts, pool, sharing, team=self.team)


class LeadingTransformer(Transformer):
    """`Transformer` whose calls run on every rank of a team."""

    def __init__(
        self,
        engines: EngineSet,
        layout: Layout,
        contexts: Sequence[BlockKV],
        pool: GraphPool | None = None,
        sharing: Sharing | None = None,
        *,
        team: Team,
    ) -> None:
        super().__init__(engines, layout, contexts, pool, sharing)
        self.team = team
        team.leads(self)

    def show_references(self, shown: References) -> None:
        if shown is self._shown:
            return
        tensors = shown.reference, shown.reference_mask, shown.additional_refs, shown.additional_masks
        with self.team.together("show_references", *(tensor.cpu() for tensor in tensors)):
            super().show_references(shown)

    def show_driving(self, driving: Tensor, driving_mask: Tensor) -> None:
        with self.team.together("show_driving", driving.cpu(), driving_mask.cpu()):
            super().show_driving(driving, driving_mask)

    def velocities(self, latent: Tensor, history_mask: Tensor, schedule: Schedule, step: int) -> list[Tensor]:
        video = torch.cat([latent, history_mask])
        with self.team.together("velocities", tuple(video.shape), step) as groups:
            groups.everyone.broadcast(video)
            return super().velocities(latent, history_mask, schedule, step)
