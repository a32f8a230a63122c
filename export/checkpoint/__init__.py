"""Reading checkpoints: opening them, recognising networks, names, quantised files, LoRA; and making random ones."""
