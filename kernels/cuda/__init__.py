"""CUDA C++ kernels: compiling them with NVRTC and launching them."""
