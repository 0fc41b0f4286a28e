// Rows of a matrix copied to panels: kPanel columns side by side, then their next rows. Kernel files only.
#pragma once

#include "product.h"

namespace tiny_llm::TINY_ISA {

constexpr int64_t kPanel = vectors_of(most_rows<float>) * kWidth;  // columns

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Floats of a panel of so many rows: of those that are multiplied together one word holds all.
static inline int64_t panel(int64_t rows) { return (rows + kTogether - 1) / kTogether * kPanel; }

#if defined(__AVX512BF16__)
static inline vf load_packed(const bf16* x, int64_t columns) { return join(x, x + columns); }
static inline vf load_packed(const bf16* x, int64_t columns, int64_t rows, int64_t width) {
    bf16 both[2][kWidth] = {};
    memcpy(both[0], x, width * sizeof *x);
    if (rows > 1) memcpy(both[1], x + columns, width * sizeof *x);
    return join(both[0], both[1]);
}
#else
template <class T>
static inline vf load_packed(const T* x, int64_t) {
    return load(x);
}
template <class T>
static inline vf load_packed(const T* x, int64_t, int64_t, int64_t width) {
    vf v = {};
    for (int64_t i = 0; i < width; ++i) v[i] = to_float(x[i]);
    return v;
}
#endif

// Rows of `columns` to columns [column, ...) of panels of `height` rows, from row `row` on.
template <class T>
void pack(const T* from, int64_t rows, int64_t columns, float* to, int64_t height, int64_t row, int64_t column) {
    for (int64_t c = 0; c < columns; c += kWidth) {
        const int64_t width = least(kWidth, columns - c), at = column + c;
        float* place = to + at / kPanel * panel(height) + panel(row) + at % kPanel;
        for (int64_t r = 0; r < rows; r += kTogether, place += kPanel) {
            const T* x = from + r * columns + c;
            const bool whole = width == kWidth && r + kTogether <= rows;
            store(place, whole ? load_packed(x, columns) : load_packed(x, columns, rows - r, width));
        }
    }
}

}  // namespace tiny_llm::TINY_ISA
