"""Attention kernels of other projects, measured beside ours where their package is installed.

A peer gets the q, k, v that our 16-bit attention gets: bf16, normed and rotated. Formats that the package does not
produce itself (FlashAttention-3's fp8) are prepared before the clock starts, as ours are. Kernels that quantise
inside the call (comfy-kitchen's int8 attention) are timed with it, and their note says so. Peers are baselines: a
generation never uses them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from scail2_rt.kernels.attention.ops import PreparedQKV
from scail2_rt.kernels.rows.ops import E4M3, E4M3_MAX


@dataclass(frozen=True, slots=True)
class Peer:
    """name of its rows; module that must import; install: the command for it; capability: those that it runs on
    (lowest, highest); eight_bit: its ceiling is the fp8 GEMM's; prepare: [H, L, D] q, k, v → a call that returns
    [L, H·D]; note: printed with its speed."""

    name: str
    module: str
    install: str
    capability: tuple[tuple[int, int], tuple[int, int]]
    eight_bit: bool
    prepare: Callable[[PreparedQKV], Callable[[], Tensor]]
    note: str = ""

    def obstacle(self, device: torch.device) -> str | None:
        """Why this peer cannot run on the device, or None."""
        if device.type != "cuda":
            return "needs an NVIDIA GPU"
        if find_spec(self.module) is None:
            return f"{self.module} is missing; {self.install}"
        lowest, highest = self.capability
        found = torch.cuda.get_device_capability(device)
        if not lowest <= found <= highest:
            needed = f"{lowest[0]}.{lowest[1]} to {highest[0]}.{highest[1]}"
            return f"needs compute capability {needed}, found {found[0]}.{found[1]}"
        return None


def quantise_per_head(x: Tensor) -> tuple[Tensor, Tensor]:
    """[H, L, D] → e4m3 [1, L, H, D] and its scale fp32 [1, H], so that x ≈ e4m3 · scale."""
    scale = x.abs().amax(dim=(1, 2)).float().clamp_min(1e-12) / E4M3_MAX
    return (x.float() / scale[:, None, None]).to(E4M3).transpose(0, 1)[None].contiguous(), scale[None]


def _fa3_bf16(prepared: PreparedQKV) -> Callable[[], Tensor]:
    from fa3_fwd_interface import flash_attn_func

    q, k, v = (x.transpose(0, 1)[None].contiguous() for x in (prepared.q, prepared.k, prepared.v))
    return lambda: _rows(flash_attn_func(q, k, v))


def _fa3_fp8(prepared: PreparedQKV) -> Callable[[], Tensor]:
    from fa3_fwd_interface import flash_attn_func

    (q, q_scale), (k, k_scale), (v, v_scale) = (quantise_per_head(x) for x in (prepared.q, prepared.k, prepared.v))
    return lambda: _rows(flash_attn_func(q, k, v, q_descale=q_scale, k_descale=k_scale, v_descale=v_scale))


def _rows(attended: Tensor | tuple[Tensor, ...]) -> Tensor:
    """[1, L, H, D], in some versions the first of a tuple → [L, H·D]."""
    return (attended if isinstance(attended, Tensor) else attended[0])[0].flatten(1)


def _comfy_int8(prepared: PreparedQKV) -> Callable[[], Tensor]:
    from comfy_kitchen import int8_attention

    q, k, v = (x[None].contiguous() for x in (prepared.q, prepared.k, prepared.v))
    return lambda: int8_attention(q, k, v)[0].transpose(0, 1).flatten(1)


_HOPPER, _ANY = ((9, 0), (9, 0)), ((8, 0), (99, 0))
_FA3 = ("fa3_fwd_interface", "pip install fa3-fwd einops", _HOPPER)
PEERS = {
    peer.name: peer
    for peer in (
        Peer("fa3-bf16", *_FA3, eight_bit=False, prepare=_fa3_bf16),
        Peer("fa3-fp8", *_FA3, eight_bit=True, prepare=_fa3_fp8, note="one scale per head and operand"),
        Peer(
            *("comfy-int8", "comfy_kitchen", "pip install comfy-kitchen", _ANY),
            eight_bit=True,
            prepare=_comfy_int8,
            note="quantises q, k, v inside the call",
        ),
    )
}
