"""Metal kernels on a CPU: the text that MLX would give to Apple's compiler, compiled by clang, checked."""
