"""From a checkpoint to an engine folder, to one safetensors file, or to ONNX files."""
