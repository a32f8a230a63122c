"""The reference: the four networks in plain PyTorch, their sizes and precisions. All other code must agree with it."""
