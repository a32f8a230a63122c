"""Stages in PyTorch with our kernels: weights loaded in the background, the VAE with rings on a GPU."""
