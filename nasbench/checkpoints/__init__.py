"""Checkpoints: families, Hugging Face folders, GGUF files, tokenizers, fetching."""
