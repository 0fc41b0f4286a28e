// Rows out of a packed matrix: what a token's id stands for.
#pragma once

#include "isa.h"
#include "matrix.h"

namespace tiny_llm {

struct Embedding {
    const int32_t* tokens;  // [count]; below 0 counts as 0, and beyond the table as its last row
    int64_t count;
    Matrix table;  // of at least one row
    float* out;    // [count, columns]
};
TINY_KERNEL(embedding, Embedding)

}  // namespace tiny_llm
