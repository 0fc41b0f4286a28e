"""tiny_llm: an LLM serving runtime on MLX, small enough to read end to end."""
