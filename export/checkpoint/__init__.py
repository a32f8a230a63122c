"""Checkpoints: opening them, recognising networks, tensor names, quantised files, LoRA, and random checkpoints."""
