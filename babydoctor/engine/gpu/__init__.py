"""The engine's step on a GPU: Triton kernels, the decoder that calls them, and CUDA graphs of decoding steps."""
