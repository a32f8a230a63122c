"""Placement of a run's weights in GPU memory: decided by `session.memory`, applied by the pipeline."""

from dataclasses import dataclass
from typing import Literal

import torch

from scail2_rt.engines.engine_set import EngineSet

BLOCK_STAGES = ("qkv", "mid", "ffn")
Kind = Literal["resident", "phased", "streamed"]


@dataclass(frozen=True, slots=True)
class Placement:
    """kind             resident: the transformer stays loaded while the VAE decodes; phased: it is released before;
                        streamed: only the first blocks stay loaded, the others pass through two buffers per stage
                        family, read from the engine folder while the preceding block runs
    resident_blocks     number of blocks (of `blocks`) whose weights stay loaded during denoising
    keeps_graphs        captured steps are kept between segments; otherwise their memory is freed for the VAE
    needed, budget      bytes of PyTorch's allocator: the run's peak, and its limit
    references          bytes that encoding the references takes besides the weights that are loaded
    context_block       bytes of one block's weights for the cross-attention's keys and values"""

    kind: Kind
    resident_blocks: int
    blocks: int
    keeps_graphs: bool
    needed: int
    budget: int
    references: int = 0
    context_block: int = 1

    @property
    def line(self) -> str:
        """The placement as one printable line."""
        what = {
            "resident": "all blocks stay in GPU memory",
            "phased": "all blocks in GPU memory while denoising, dropped for decoding",
            "streamed": f"{self.resident_blocks} of {self.blocks} blocks in GPU memory, the others streamed from the "
            "engine folder, all dropped for decoding",
        }[self.kind]
        return f"{self.kind}: {what}; {self.needed / 2**30:.1f} of {self.budget / 2**30:.1f} GiB planned"

    def contexts_ahead(self, reserved: int) -> int:
        """Return the number of blocks whose context weights may be loaded while the references are encoded, without a
        higher peak. reserved: bytes that PyTorch's allocator holds before."""
        return min(max(self.needed - self.references - reserved, 0) // self.context_block, self.blocks)

    @property
    def drops_blocks(self) -> bool:
        """Whether the blocks are released before the VAE decodes."""
        return self.kind != "resident"

    @property
    def resident(self) -> list[str]:
        """The block stages that stay loaded during denoising, in execution order."""
        return _stages(range(self.resident_blocks))

    @property
    def streamed(self) -> list[str]:
        """The block stages that are streamed, in execution order."""
        return _stages(range(self.resident_blocks, self.blocks))


def _stages(blocks: range) -> list[str]:
    return [f"dit.blocks.{i}.{name}" for i in blocks for name in BLOCK_STAGES]


def apply(placement: Placement, engines: EngineSet, others: int = 0) -> None:
    """Apply the placement to the engines and set the allocator's limit.

    others: bytes that the process's other sessions hold; the allocator counts them too."""
    total = torch.cuda.mem_get_info()[1]
    limited = engines.execution.vram_limit is not None
    torch.cuda.set_per_process_memory_fraction(min((placement.budget + others) / total, 1.0) if limited else 1.0)
    engines.stream(placement.streamed)


def lift_limit(engines: EngineSet) -> None:
    """Remove the allocator's limit after a run: it does not apply to other work of this process."""
    if engines.execution.vram_limit is not None:
        torch.cuda.set_per_process_memory_fraction(1.0)
