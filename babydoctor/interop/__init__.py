"""In and out: original LLaVA checkpoints, transformers' Llava, llama.cpp's GGUF."""
