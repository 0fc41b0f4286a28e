// The Python class _cpu.Matrix. Owns a packed weight's memory, as an mx.array, and its description.
#pragma once

#include "../matrix.h"
#include "../memory.h"
#include "mlx/mlx.h"

namespace tiny_llm {

namespace mx = mlx::core;

struct PackedMatrix {
    mx::array data;  // uint8 [tiles, bytes of a tile], 64-byte aligned, in the weights' arena
    Matrix layout;   // its `data` points into the array's
};

// An array of zeros in memory that `allocate` gives. What nobody has written to takes none.
mx::array arena_array(mx::Shape shape, mx::Dtype dtype, int64_t bytes, Block (*allocate)(size_t));

// Memory for `layout`, zeroed and writable until it is given to Python.
PackedMatrix make_matrix(Matrix layout, int64_t bytes_of_tile);

// The kind that goes with a floating point dtype; throws std::invalid_argument for another.
Kind kind_of(const char* op, const mx::array& a);

}  // namespace tiny_llm
