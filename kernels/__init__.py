"""What mixes tokens, the fused row operations and the VAE's convolutions: kernels for GPUs, each with a twin."""
