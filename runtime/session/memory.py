"""What lies in GPU memory when: worked out once a run, from the weights' sizes, the token layout and what is free.

Three plans, the first that fits is taken. *resident*: the transformer stays loaded through decoding, for the next
segment. *phased*: it is dropped before the VAE decodes and loaded again. *streamed*: only the first blocks stay; the
others pass through two buffers a stage family, read from the engine folder while the block before them runs.
The sizes of activations are formulas of the buffers that are alive at once (`runtime.pipeline.transformer`,
`engines.torch_backend.vae_streams`); `scail2-rt bench generate` measures what the allocator really held.
"""

from dataclasses import dataclass

import torch

from scail2_rt.engines.engine_set import EngineSet
from scail2_rt.export.models.config import DiTConfig, VAEConfig
from scail2_rt.kernels.attention.variants import AttentionVariant
from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.core.geometry import CLIP_TOKENS, Layout
from scail2_rt.runtime.core.request import JobPlan

CONTEXT_BYTES = 600 << 20  # what CUDA, the libraries' workspaces and compiled kernels take beside the allocator
MARGIN_BYTES = 512 << 20
VAE_BUFFERS = 104  # pixel-sized [dim, H, W] buffers of the decoder's rings and streams (8.3 GiB at 512×896 in fp16)
BLOCK_STAGES = ("qkv", "mid", "ffn")


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """kind: resident, phased or streamed; resident_blocks: how many blocks keep their weights; needed and budget in
    bytes of the allocator."""

    kind: str
    resident_blocks: int
    blocks: int
    needed: int
    budget: int

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


def activation_bytes(config: DiTConfig, layout: Layout, passes: int, element: int, attention: AttentionVariant) -> int:
    """Bytes alive at the widest point of a forward pass, between a block's qkv and its attention: the residual stream,
    the tokens that do not change, q k v as projected (`element` bytes a value) and as prepared, the shared prefix."""
    static = layout.reference_tokens + layout.driving_tokens
    shared = (4 + element) if passes > 1 else 0
    prepared = attention.prepared_bytes(element)
    return layout.tokens * config.dim * (4 + 3 * element + prepared + shared) + static * config.dim * 4


def context_bytes(config: DiTConfig, passes: int, element: int) -> int:
    """Cross-attention keys and values of all blocks."""
    return passes * config.layers * (config.text_len + CLIP_TOKENS) * 2 * config.dim * element


def decode_bytes(config: VAEConfig, height: int, width: int, element: int) -> int:
    """Buffers of the VAE while it decodes."""
    return VAE_BUFFERS * config.dim * height * width * element


def plan_memory(plan: JobPlan, engines: EngineSet) -> MemoryPlan | None:
    """The plan for a run; None where weights need no plan (on a CPU, and for executors whose plans carry them).

    InputError when not even two streamed blocks fit."""
    if not engines.places_weights:
        return None
    dit, vae = engines.config.dit, engines.config.vae
    assert dit is not None
    assert vae is not None
    passes = plan.request.passes
    element = engines.compute_dtype("dit.blocks.0.qkv").itemsize
    work = activation_bytes(dit, plan.layout, passes, element, engines.attention) + context_bytes(dit, passes, element)
    work += plan.layout.tokens * 3 * dit.dim * element  # for fragmentation: the largest buffer, q k v, is one piece
    work += MARGIN_BYTES + sum(engines.store.layout.stage_bytes(f"dit.{name}") for name in ("embed", "head"))
    vae_element = engines.compute_dtype("vae.decode_step").itemsize
    decode = decode_bytes(vae, plan.height, plan.width, vae_element) + MARGIN_BYTES
    sizes = [
        sum(engines.store.layout.stage_bytes(f"dit.blocks.{i}.{name}") for name in BLOCK_STAGES)
        for i in range(dit.layers)
    ]
    return choose_plan(sizes, work, decode, memory_budget(engines.execution.vram_limit))


def memory_budget(limit: int | None) -> int:
    """Bytes that the allocator may hold: what is free and what it holds already, or the limit less the context."""
    free, _ = torch.cuda.mem_get_info()
    budget = free + torch.cuda.memory_reserved() - CONTEXT_BYTES
    return budget if limit is None else min(budget, limit - CONTEXT_BYTES)


def choose_plan(sizes: list[int], work: int, decode: int, budget: int) -> MemoryPlan:
    """The first of the three plans that fits. `sizes`: bytes of each block's weights; `work`, `decode`: bytes that
    denoising and decoding need beside them."""
    blocks, weights = len(sizes), sum(sizes)
    if weights + max(work, decode) <= budget:
        return MemoryPlan("resident", blocks, blocks, weights + max(work, decode), budget)
    if max(weights + work, decode) <= budget:
        return MemoryPlan("phased", blocks, blocks, max(weights + work, decode), budget)
    slots = 2 * max(sizes)
    resident = max(min(int((budget - work - slots) // max(sizes)), blocks - 2), 0)
    needed = max(work + slots + resident * max(sizes), decode)
    if needed > budget:
        raise InputError(
            f"This run needs at least {(needed + CONTEXT_BYTES) / 2**30:.1f} GiB of GPU memory even with streamed "
            f"weights, and may use {(budget + CONTEXT_BYTES) / 2**30:.1f} GiB: use a smaller --size, fewer frames a "
            "segment (--segment-length), or a larger --vram-limit."
        )
    return MemoryPlan("streamed", resident, blocks, needed, budget)


def apply(memory: MemoryPlan, engines: EngineSet) -> None:
    """Tell the engines and the allocator."""
    if engines.execution.vram_limit is not None:
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(memory.budget / total)
    engines.stream(_stages(range(memory.resident_blocks, memory.blocks)))


def resident_stages(memory: MemoryPlan) -> list[str]:
    """The block stages that stay loaded while denoising, in the order in which they are first run."""
    return _stages(range(memory.resident_blocks))


def _stages(blocks: range) -> list[str]:
    return [f"dit.blocks.{i}.{name}" for i in blocks for name in BLOCK_STAGES]
