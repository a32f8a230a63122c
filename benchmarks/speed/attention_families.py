"""Input families for measuring the error of attention kernels.

Zero-mean Gaussian inputs hide most errors of 8-bit attention; the other families show them.

    normal      q, k, v ~ N(0, 1)
    shifted     normal, with V shifted by ±0.5 per channel: shows errors of low-precision accumulation over many keys
    clustered   tokens in 4 contiguous runs, q and k aligned with one direction per run, V similar within a run:
                subtracting a global mean does not help
    realistic   Student-t features (4 degrees of freedom), RMS-normed over all heads, channel weights about 1 with 2 %
                outliers of 3 to 8, a common direction added to every key, V with its own scale and mean per channel
                (softmax very peaked)
    flat        realistic with channel weights × 0.45 (softmax as in a trained model's middle layers)
    peaked      every query is aligned with one key (largest probability about 0.8)
"""

import math

import torch
from torch import Tensor

FAMILIES = ("normal", "shifted", "clustered", "realistic", "flat", "peaked")


class _Draw:
    """A seeded random number generator on a device."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.device, self.generator = device, torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device)

    def student(self, *shape: int) -> Tensor:
        chi = self.normal(*shape).square_()
        for _ in range(3):
            chi += self.normal(*shape).square_()
        return self.normal(*shape).div_(chi.div_(4).sqrt_())

    def normed(self, x: Tensor, scale: float) -> Tensor:
        """RMS norm of x [L, C] over all channels, times `scale` and channel weights of which 2 % are outliers."""
        channels = x.shape[1]
        weight = (1 + 0.3 * self.normal(channels)).abs()
        picked = torch.randperm(channels, generator=self.generator, device=self.device)[: max(1, channels // 50)]
        weight[picked] = 3 + 5 * torch.rand(len(picked), generator=self.generator, device=self.device)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight * scale


def make(
    family: str, tokens: int, heads: int, width: int, device: torch.device, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw q, k, v of a family, each fp32 [H, L, D]. width: head dimension D. Raises ValueError for an unknown
    family."""
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; choose from {', '.join(FAMILIES)}")
    draw = _Draw(seed, device)
    shape = (heads, tokens, width)
    if family in ("realistic", "flat"):
        return _trained(draw, shape, 0.45 if family == "flat" else 1.0)
    q, k, v = draw.normal(*shape), draw.normal(*shape), draw.normal(*shape)
    if family == "shifted":
        v += 0.5 * draw.normal(heads, 1, width).sign()
    elif family == "clustered":
        run = torch.arange(tokens, device=device) * 4 // tokens
        direction = torch.nn.functional.normalize(draw.normal(heads, 4, width), dim=-1)
        centre = draw.normal(heads, 4, width)
        q, k, v = q + 9 * direction[:, run], k + 9 * direction[:, run], centre[:, run] + 0.5 * v
    elif family == "peaked":
        pick = torch.randint(0, tokens, (heads, tokens), generator=draw.generator, device=device)
        q = 0.4 * q + 1.15 * torch.gather(k, 1, pick[..., None].expand(-1, -1, width))
    return q, k, v


def _trained(draw: _Draw, shape: tuple[int, int, int], scale: float) -> tuple[Tensor, Tensor, Tensor]:
    heads, tokens, width = shape
    channels = heads * width
    q = draw.normed(draw.student(tokens, channels), scale)
    k = draw.normed(draw.student(tokens, channels) + draw.normal(channels), scale)
    spread = 0.5 + 2 * torch.rand(channels, generator=draw.generator, device=draw.device)
    v = draw.student(tokens, channels) * spread + draw.normal(channels)
    q, k, v = (x.view(tokens, heads, width).transpose(0, 1) for x in (q, k, v))
    return q, k, v


def reference(q: Tensor, k: Tensor, v: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Exact attention in fp64 for `rows` evenly spaced queries. Returns (row indices [rows], fp64 [H, rows, D])."""
    index = torch.linspace(0, q.shape[1] - 1, min(rows, q.shape[1]), device=q.device).long()
    out = []
    for head in range(q.shape[0]):
        score = q[head, index].double() @ k[head].double().T / math.sqrt(q.shape[-1])
        out.append(score.softmax(-1) @ v[head].double())
    return index, torch.stack(out)


def error(out: Tensor, ref: Tensor) -> tuple[float, float, float]:
    """(relative Frobenius error, mean row cosine, worst row cosine); (inf, 0, -1) for non-finite values."""
    out, ref = out.double(), ref.double()
    if not torch.isfinite(out).all():
        return math.inf, 0.0, -1.0
    cosine = torch.nn.functional.cosine_similarity(out, ref, dim=-1)
    return ((out - ref).norm() / ref.norm()).item(), cosine.mean().item(), cosine.min().item()
