"""GPU kernels with PyTorch twins: attention and other operations across tokens, fused row operations, convolutions."""
