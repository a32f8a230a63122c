"""Weights of a module, filled from a checkpoint or a weight store."""

import torch
from torch import nn


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """Return an uninitialised weight without gradient."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)
