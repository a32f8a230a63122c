"""Conversion between sRGB and CIELAB (CIE 1976), for perceptual colour differences in the colour anchor and the quality
benchmark."""

import torch
from torch import Tensor

# Linear sRGB to XYZ (IEC 61966-2-1, D65), which `_rgb_to_xyz` scales so that white becomes (1, 1, 1).
_RGB_TO_XYZ = (
    (0.4124564, 0.3575761, 0.1804375),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339, 0.1191920, 0.9503041),
)
_EDGE = 6 / 29  # between the cube root and the linear part of CIELAB


def rgb_to_lab(rgb: Tensor) -> Tensor:
    """sRGB [3, ...] in 0..1 → CIELAB [3, ...] (L 0..100), D65."""
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb.clamp_min(0.04) + 0.055) / 1.055) ** 2.4)
    xyz = torch.einsum("ij,j...->i...", _rgb_to_xyz().to(rgb), linear)
    root = torch.where(xyz > _EDGE**3, xyz.clamp_min(_EDGE**3) ** (1 / 3), xyz / (3 * _EDGE**2) + 4 / 29)
    x, y, z = root
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def lab_to_rgb(lab: Tensor) -> Tensor:
    """CIELAB [3, ...] → sRGB [3, ...]; colours outside the sRGB gamut leave 0..1."""
    light, a, b = lab
    y = (light + 16) / 116
    root = torch.stack([y + a / 500, y, y - b / 200])
    xyz = torch.where(root > _EDGE, root**3, 3 * _EDGE**2 * (root - 4 / 29))
    linear = torch.einsum("ij,j...->i...", torch.linalg.inv(_rgb_to_xyz()).to(lab), xyz)
    return torch.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear.clamp_min(0.003) ** (1 / 2.4) - 0.055)


def _rgb_to_xyz() -> Tensor:
    matrix = torch.tensor(_RGB_TO_XYZ, dtype=torch.float64)
    return matrix / matrix.sum(1, keepdim=True)
