"""How the weights of a run lie in GPU memory: a decision of `session.memory`, carried out by the pipeline."""

from dataclasses import dataclass
from typing import Literal

import torch

from scail2_rt.engines.engine_set import EngineSet

BLOCK_STAGES = ("qkv", "mid", "ffn")
Kind = Literal["resident", "phased", "streamed"]


@dataclass(frozen=True, slots=True)
class Placement:
    """kind             resident: the transformer stays loaded while the VAE decodes; phased: it is dropped before;
                        streamed: of the transformer's blocks only the first stay, the others pass through two buffers
                        per stage family, read from the engine folder while the block before them runs
    resident_blocks     how many blocks keep their weights while denoising, of `blocks`
    keeps_graphs        recorded steps stay from segment to segment; else their memory goes to the VAE
    needed, budget      bytes of PyTorch's allocator: what the run takes at once, and what it may take
    contexts_ahead      how many blocks' context weights may be loaded while the driving clip is encoded, without a
                        higher peak"""

    kind: Kind
    resident_blocks: int
    blocks: int
    keeps_graphs: bool
    needed: int
    budget: int
    contexts_ahead: int = 0

    @property
    def line(self) -> str:
        """One printable line."""
        what = {
            "resident": "all blocks stay in GPU memory",
            "phased": "all blocks in GPU memory while denoising, dropped for decoding",
            "streamed": f"{self.resident_blocks} of {self.blocks} blocks in GPU memory, the others streamed from the "
            "engine folder, all dropped for decoding",
        }[self.kind]
        return f"{self.kind}: {what}; {self.needed / 2**30:.1f} of {self.budget / 2**30:.1f} GiB planned"

    @property
    def drops_blocks(self) -> bool:
        """Do the blocks leave memory before the VAE decodes?"""
        return self.kind != "resident"

    @property
    def resident(self) -> list[str]:
        """The block stages that stay loaded while denoising, in the order in which they are first run."""
        return _stages(range(self.resident_blocks))

    @property
    def streamed(self) -> list[str]:
        """The block stages that are streamed, in that order."""
        return _stages(range(self.resident_blocks, self.blocks))


def _stages(blocks: range) -> list[str]:
    return [f"dit.blocks.{i}.{name}" for i in blocks for name in BLOCK_STAGES]


def apply(placement: Placement, engines: EngineSet, others: int = 0) -> None:
    """Tell the engines and the allocator, which counts the bytes that others in this process hold, too."""
    total = torch.cuda.mem_get_info()[1]
    limited = engines.execution.vram_limit is not None
    torch.cuda.set_per_process_memory_fraction(min((placement.budget + others) / total, 1.0) if limited else 1.0)
    engines.stream(placement.streamed)


def lift_limit(engines: EngineSet) -> None:
    """The limit is the run's: what else the process does on the GPU may use all of it."""
    if engines.execution.vram_limit is not None:
        torch.cuda.set_per_process_memory_fraction(1.0)
