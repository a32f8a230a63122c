"""Row operations: norm with modulation, gated residual, GELU, each with quantisation where it is wanted."""
