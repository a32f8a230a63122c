"""The four networks in plain PyTorch, their sizes and the precisions they run in. All else must agree with these."""
