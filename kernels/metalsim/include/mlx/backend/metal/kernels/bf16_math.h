// In place of MLX's: metal_stdlib here has the functions for bfloat already.
#pragma once
