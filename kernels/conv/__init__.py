"""The VAE's causal convolutions."""
