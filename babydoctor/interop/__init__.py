"""Import and export: original LLaVA checkpoints, transformers' Llava, llama.cpp's GGUF."""
