"""Files -> named tensors, read lazily: GGUF, safetensors, and the names inside them."""
