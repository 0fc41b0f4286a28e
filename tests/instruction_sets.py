"""The instruction sets that the CPU kernels may have on this kind of machine, the least first."""

import platform

ON_ARM = platform.machine() in ("aarch64", "arm64") and platform.system() == "Linux"
SETS = ("portable", "dotprod", "i8mm") if ON_ARM else ("portable", "avx2", "avx512", "avx512bf16", "amx")
NAMES = " or ".join(", ".join(SETS).rsplit(", ", 1))
