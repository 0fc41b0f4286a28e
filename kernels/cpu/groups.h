// The groups of a packed quantized matrix, and how tiles of outputs are dealt out. Kernel files only.
#pragma once

#include "activations.h"
#include "matrix.h"
#include "simd.h"

namespace tiny_llm::TINY_ISA {

struct Groups {
    int64_t count, bytes;  // of a tile; of one group
    int size;              // inputs
    Kind scales;
    int64_t lines() const { return 2 * kTile * bits_of(scales) / 8; }  // bytes before a group's first line
};

// `count`: m.columns / m.group_size
static inline Groups groups_of(const Matrix& m, int64_t count) {
    return {count, group_bytes(m), m.group_size, m.scales};
}

static inline vf load_any(const char* p, Kind kind, int64_t i) {
    if (kind == Kind::bf16) return load((const bf16*)p + i);
    if (kind == Kind::f16) return load((const f16*)p + i);
    return load((const float*)p + i);
}

// Where tile `index` of an expert of m lies.
static inline const char* tile_of(const Matrix& m, int64_t expert, int64_t index) {
    return m.data + (expert * tiles(m) + index) * tile_bytes(m);
}

// Calls work(each), on all threads; each(run) then calls run(at, expert, index, begin, end) for some of what there is:
// tile `index` of an expert of matrix `at` (with its up tile, if gated) and blocks [begin, end) of x.
template <class Work>
static inline void for_each_tile(const Linear& a, const Activations& x, const Work& work) {
    // Bytes of x that stay near while tiles pass by, and how many rows' products take as long as reading the weights.
    const int64_t cache = (x.lanes ? 512 : 256) * 1024, rows_a_read = x.lanes ? 32 : 4;
    constexpr int64_t kStep = 32 * 1024;  // bytes of weights that one row takes at a time
    const Matrix& m = a.matrices[0];
    const int64_t block_bytes = m.columns * (m.exact ? 4 : 1) * a.rows / x.blocks;
    const int64_t some = cache / block_bytes > 1 ? cache / block_bytes : 1;
    const int64_t chunks = a.parts ? a.part_count : (x.blocks + some - 1) / some;
    int64_t count = 0;
    for (int i = 0; i < (a.gated ? 1 : a.count); ++i) count += tiles(a.matrices[i]);
    const int64_t bytes = tile_bytes(m) * (a.gated ? 2 : 1) * (1 + a.rows / chunks / rows_a_read);
    parallel_for(count * chunks, 1 + kStep / bytes, [&](int64_t from, int64_t to) {
        work([&](const auto& run) {
            for (int64_t chunk = from / count; chunk * count < to; ++chunk) {
                const int64_t first = chunk * count, past = to - first < count ? to - first : count;
                const int64_t begin = a.parts ? x.part_blocks[chunk] : x.blocks * chunk / chunks;
                const int64_t end = a.parts ? x.part_blocks[chunk + 1] : x.blocks * (chunk + 1) / chunks;
                const int64_t expert = a.parts ? a.parts[chunk].expert : 0;
                for (int64_t i = from > first ? from - first : 0; i < past; ++i) {
                    int64_t index = i;
                    int at = 0;
                    while (index >= tiles(a.matrices[at])) index -= tiles(a.matrices[at++]);
                    run(at, expert, index, begin, end);
                }
            }
        });
    });
}

}  // namespace tiny_llm::TINY_ISA
