"""TensorRT's genuine Python interface without its library: bindings, type stubs, and a recorder that enforces them."""
