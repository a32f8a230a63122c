"""A weight of a module, which a checkpoint or a weight store fills."""

import torch
from torch import nn


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """An uninitialised weight that takes no gradient."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)
