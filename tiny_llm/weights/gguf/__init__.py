"""GGUF files, as llama.cpp writes them: header, facts, tensors."""
