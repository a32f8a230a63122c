"""Decoding divided by height: each rank decodes a strip of every frame, and all ranks receive the complete frame.

Strips overlap by the rows that their pixels depend on (`engines.torch_backend.vae_streams.halo`), so that nothing is
exchanged between layers."""

import torch
from torch import Tensor
from torch.nn import functional as F

from scail2_rt.engines.engine_set import EngineSet
from scail2_rt.engines.vae_stream import Part
from scail2_rt.export.models.vae import PIXELS_PER_CELL
from scail2_rt.kernels.peers import Peers


class SharedDecoding:
    """Shared decoding of one clip. latent [16, F, h, w] is overwritten with that of rank 0."""

    def __init__(self, engines: EngineSet, peers: Peers, latent: Tensor) -> None:
        self._peers, self._latent, self._next = peers, peers.broadcast(latent), 0
        self._part = Part(peers.rank, peers.size)
        self._stream = engines.part_stream(self._part)

    def frame(self) -> Tensor:
        """Decode the next latent frame: unclamped pixels [3, 1 or 4, 8h, 8w]. Frees the memory after the last frame."""
        _, frames, height, _ = self._latent.shape
        latent, self._next = self._latent[:, self._next : self._next + 1], self._next + 1
        start, stop = self._part.rows(height)
        most = PIXELS_PER_CELL * self._part.largest(height)
        pixels = self._stream.step(latent)
        mine = F.pad(pixels, (0, 0, 0, most - PIXELS_PER_CELL * (stop - start)))
        gathered = self._peers.gather(mine)  # [N, 3, frames, rows, W]
        if self._next == frames:
            self.close()
        return torch.cat(gathered.unbind(), dim=2)[:, :, : PIXELS_PER_CELL * height]

    def close(self) -> None:
        self._stream.close()
