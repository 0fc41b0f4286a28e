"""HTTP on top of the engine: OpenAI's interface, its errors, its limits."""
