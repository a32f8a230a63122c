"""Stages in TensorRT: building plans and running them."""
