"""What mixes tokens, and the fused row operations: PyTorch twins of every kernel, run on any device."""
