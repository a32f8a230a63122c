"""Stages, or the whole transformer, as ONNX graphs."""
