"""Row operations: norm with modulation, gated residual, GELU, each optionally followed by quantisation."""
