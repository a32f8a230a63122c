"""The memory model: bytes that a run holds in each phase, computed before anything is loaded.

The dry run, the plan and the run use the same model. If the runtime places the weights on the GPU, the model also
chooses the placement (`pipeline.placement`): the first of four that fits the budget. Sizes of weights come from the
manifest. Sizes of activations are formulas for the buffers that are alive at the same time (`pipeline.transformer`,
`engines.torch_backend`). `scail2-rt bench generate` compares them with the allocator and the driver.
"""

from dataclasses import dataclass, replace

from scail2_rt.engines.engine_set import EngineSet
from scail2_rt.engines.tensorrt_backend.preflight import host_memory
from scail2_rt.export.models.config import DiTConfig
from scail2_rt.kernels.attention.eight_bit import TILE
from scail2_rt.kernels.attention.variants import AttentionVariant
from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.core.geometry import CLIP_TOKENS, Layout
from scail2_rt.runtime.core.plan import Plan
from scail2_rt.runtime.pipeline.conditioning import AHEAD as LAYERS_AHEAD
from scail2_rt.runtime.pipeline.placement import BLOCK_STAGES, Kind, Placement
from scail2_rt.runtime.pipeline.transformer import AHEAD as BLOCKS_AHEAD

LIBRARY_BYTES = 800 << 20  # CUDA, workspaces of libraries and compiled kernels, outside the allocator
MARGIN_BYTES = 512 << 20
# Pixel-sized [dim, H, W] buffers of the VAE's rings and streams, and of what a step allocates. Measured at 512×896 and
# 704×1280 in fp16, before at least four unused ones were removed: 88 to 90 for decoding, 61 to 62 for encoding.
# `bench generate` shows the estimate beside the peak.
DECODE_BUFFERS, ENCODE_BUFFERS = 88, 59


@dataclass(frozen=True, slots=True)
class MemoryModel:
    """Bytes of the parts of one run.

    blocks         weights of each block that are used at every step
    constant       other weights of the transformer that stay loaded while denoising
    text, clip, context_weights
                   weights that these phases hold at the same time
    context_block  context weights of one block
    vae_encode, vae_decode
                   weights and buffers at full size
    vae_driving    weights and buffers for a segment's driving clip (half size), its frames, and the history if segments
                   overlap
    context        cross-attention keys and values of all blocks
    tokens         token buffers that a layout keeps
    work           activations of a forward pass, which a recorded step keeps
    margin         memory that the allocator cannot use"""

    blocks: tuple[int, ...]
    constant: int
    text: int
    clip: int
    context_weights: int
    context_block: int
    vae_encode: int
    vae_decode: int
    vae_driving: int
    context: int
    tokens: int
    work: int
    margin: int = 0

    def phases(self, placement: Placement | None) -> dict[str, int]:
        """Return bytes per phase. Without a placement all weights stay in memory."""
        count = len(self.blocks) if placement is None else placement.resident_blocks
        streamed = placement is not None and placement.kind == "streamed"
        slots = 2 * max(self.blocks) if streamed else 0
        weights = sum(self.blocks[:count]) + self.constant
        kept = self.context + self.tokens
        graphs = self.work if placement is not None and placement.keeps_graphs else 0
        # in an open session placed weights are loaded before the context is computed; others at their first use
        before_context = self.context if placement is None else weights + kept + graphs + self.margin
        while_decoding = weights if placement is None or not placement.drops_blocks else self.constant
        return {
            "text": self.text,
            "clip": self.clip,
            "reference": self.vae_encode + self.clip + self.margin,
            "driving": weights + kept + graphs + self.vae_driving + self.margin,
            "context": before_context + self.context_weights,
            "denoise": weights + slots + kept + self.work + self.margin,
            "decode": while_decoding + kept + graphs + self.vae_decode + self.margin,
        }


def memory_model(plan: Plan, engines: EngineSet, gpus: int = 1) -> MemoryModel:
    """Return the model of one of `gpus` processes that share the plan. Raises InputError if the engine folder lacks a
    network."""
    dit, vae = engines.config.dit, engines.config.vae
    if dit is None or vae is None or engines.config.umt5 is None or engines.config.clip is None:
        parts = {name: getattr(engines.config, name) for name in ("dit", "vae", "umt5", "clip")}
        lacking = ", ".join(name for name, part in parts.items() if part is None)
        raise InputError(f"The engine folder has no {lacking}. Build it from a complete checkpoint.")
    sizes = {stage.name: stage.weight_bytes for stage in engines.manifest.stages}
    on_demand = engines.places_weights  # else (mapped store, plans) all weights of a phase are loaded together
    element = engines.compute_dtype("dit.blocks.0.qkv").itemsize
    halves = 2 if gpus % 2 == 0 and plan.request.passes == 2 else 1
    passes, sharing = plan.request.passes // halves, gpus // halves
    pixels = vae.dim * plan.height * plan.width * engines.compute_dtype("vae.decode_step").itemsize
    encode = ENCODE_BUFFERS * pixels
    frames = 3 * plan.height * plan.width * max(segment.padded_frames for segment in plan.segments)

    def weights(prefix: str, suffix: str = "") -> list[int]:
        return [size for name, size in sizes.items() if name.startswith(prefix) and name.endswith(suffix)]

    layers, kv = weights("umt5.layers."), weights("dit.blocks.", ".context_kv")
    later = any(segment.overlap for segment in plan.segments)
    hidden = 0 if on_demand else 2 * min(plan.layout.tokens, engines.max_rows) * dit.ffn_dim * element
    encoder = max(weights("vae.encode"), default=0)
    return MemoryModel(
        blocks=tuple(sum(sizes[f"dit.blocks.{i}.{name}"] for name in BLOCK_STAGES) for i in range(dit.layers)),
        constant=sum(sizes[f"dit.{name}"] for name in ("embed", "head")),
        text=sum(layers[: LAYERS_AHEAD + 1]) if on_demand else sum(weights("umt5.")),
        clip=sum(weights("clip")),
        context_weights=sum(kv[: BLOCKS_AHEAD + 1]) if on_demand else sum(kv),
        context_block=max(kv),
        vae_encode=encoder + encode,
        vae_decode=max(weights("vae.decode"), default=0) + DECODE_BUFFERS * pixels,
        vae_driving=encoder + (encode if later else encode // 4) + frames,
        context=context_bytes(dit, passes, element),
        tokens=4 * dit.dim * (plan.layout.reference_tokens + plan.layout.driving_tokens),
        work=shared_bytes(dit, plan.layout, passes, element, engines.attention, sharing) + hidden,
        margin=MARGIN_BYTES if on_demand else 0,
    )


def activation_bytes(config: DiTConfig, layout: Layout, passes: int, element: int, attention: AttentionVariant) -> int:
    """Return the peak bytes of a forward pass, which is between a block's qkv and its attention.

    Per token and channel: the fp32 residual stream, q k v as projected (`element` bytes per value) and as prepared, the
    shared prefix of two passes, and q k v once more for fragmentation, because that buffer must be contiguous."""
    projected = 3 * element
    shared = (4 + element) if passes > 1 else 0
    return layout.tokens * config.dim * (4 + projected + attention.prepared_bytes(element) + shared + projected)


def shared_bytes(
    config: DiTConfig, layout: Layout, passes: int, element: int, attention: AttentionVariant, sharing: int
) -> int:
    """Return `activation_bytes` of one of `sharing` processes, each with its share of the rows, plus its exchange
    buffers: q, k and v as received and in order; the attention's output, and the returned output as received and in
    order."""
    complete = activation_bytes(config, layout, passes, element, attention)
    if sharing == 1:
        return complete
    rows = -(-layout.tokens // (sharing * TILE)) * TILE
    operands = 3 if attention.v is not None else 3 * element
    return complete * rows // layout.tokens + rows * config.dim * (2 * operands + 3 * min(element, 2))


def context_bytes(config: DiTConfig, passes: int, element: int) -> int:
    """Return the bytes of the cross-attention keys and values of all blocks."""
    return passes * config.layers * (config.text_len + CLIP_TOKENS) * 2 * config.dim * element


def memory_budget(limit: int | None, others: int = 0) -> int:
    """Return the bytes that a run may use on the current GPU: free memory plus the memory of PyTorch's allocator, minus
    `others` (bytes in the allocator that are not the session's) and `LIBRARY_BYTES`; at most limit - LIBRARY_BYTES."""
    import torch

    free, _ = torch.cuda.mem_get_info()
    budget = free + torch.cuda.memory_reserved() - others - LIBRARY_BYTES
    return budget if limit is None else min(budget, limit - LIBRARY_BYTES)


def choose_placement(model: MemoryModel, budget: int, graphs: bool = True) -> Placement:
    """Return the first placement that fits the budget (bytes). graphs: steps are recorded, and their buffers may stay.
    Raises InputError if not even two streamed blocks fit."""
    blocks = len(model.blocks)

    def placed(kind: Kind, resident: int, keeps_graphs: bool = False) -> Placement:
        phases = model.phases(way := Placement(kind, resident, blocks, keeps_graphs, 0, budget))
        needed, references = max(phases.values()), phases["reference"]
        return replace(way, needed=needed, references=references, context_block=model.context_block)

    ways = [placed("resident", blocks, True)] if graphs else []
    ways += [placed("resident", blocks), placed("phased", blocks)]
    for way in ways:
        if way.needed <= budget:
            return way
    least = placed("streamed", 0)
    if least.needed > budget:
        raise InputError(
            f"This run needs at least {(least.needed + LIBRARY_BYTES) / 2**30:.1f} GiB of GPU memory even with "
            f"streamed weights, and may use {(budget + LIBRARY_BYTES) / 2**30:.1f} GiB. Use a smaller --size, fewer "
            "frames per segment (--segment-length), or a larger --vram-limit."
        )
    counts = range(max(blocks - 2, 0), -1, -1)
    return next(way for count in counts if (way := placed("streamed", count)).needed <= budget)


def place(plan: Plan, engines: EngineSet, gpus: int = 1, others: int = 0) -> Placement | None:
    """Return the placement of the weights in each of `gpus` processes, or None if the runtime does not place them (on a
    CPU, and if plans contain them). others: bytes of GPU memory that other code in this process holds.

    Raises InputError if the run does not fit this machine."""
    model = memory_model(plan, engines, gpus)
    if engines.places_weights:
        return choose_placement(
            model, memory_budget(engines.execution.vram_limit, others), engines.execution.cuda_graphs
        )
    if engines.device.type == "cpu":
        check_host(model)
    return None


def check_host(model: MemoryModel) -> None:
    """Raise InputError if the activations exceed the host memory. Weights are mapped, so they may exceed it."""
    activations = max(model.context + model.tokens + model.work, model.vae_encode, model.vae_decode)
    available = host_memory()
    if activations > available:
        raise InputError(
            f"This run needs {activations / 2**30:.1f} GiB of memory besides its weights, and this computer has "
            f"{available / 2**30:.1f} GiB free. Use a smaller --size or fewer frames per segment (--segment-length)."
        )
