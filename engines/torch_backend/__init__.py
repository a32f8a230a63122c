"""Stages in PyTorch with our kernels: weights are loaded in the background; the VAE uses ring buffers on a GPU."""
