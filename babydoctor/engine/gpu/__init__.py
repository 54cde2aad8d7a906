"""The engine's step on a GPU: Triton kernels, the decoder that calls them, and decoding steps as CUDA graphs."""
