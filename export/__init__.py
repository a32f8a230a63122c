"""Checkpoint to graphs: release layouts, LoRA, the plain PyTorch model, fp8 weights, ONNX stages."""
