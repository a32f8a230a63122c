"""Self- and cross-attention: preparation of q, k, v, the kernels of every variant and the choice between them."""
