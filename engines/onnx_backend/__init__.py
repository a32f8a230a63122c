"""Stages in ONNX Runtime."""
