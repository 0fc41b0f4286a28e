#include "dense_matmul.h"

#include "ahead.h"
#include "epilogue.h"
#include "pool.h"

namespace tiny_llm::TINY_ISA {
namespace {

constexpr int kParts = kTile / kWidth;  // vectors for a tile's outputs

// The block of sums that stays in registers, with room for weights and one input.
#if defined(__AVX512F__)
constexpr int kRows = 12, kTiles = 2;
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int kRows = 6, kTiles = 1;
#else
constexpr int kRows = 3, kTiles = 1;
#endif

// Rows that are handled while a tile is in the cache.
constexpr int64_t kChunk = 256;
constexpr int kScratchSlot = 0;

struct Sums {
    float at[2][kRows][kTile];  // of two tiles: neighbours, or gate and up
};

// Inputs that lie together in a tile: a word holds two of bf16, and a shift or a mask makes one a float.
template <class T>
constexpr int kStep = 1;
template <>
constexpr int kStep<bf16> = 2;

// The weights of `kWidth` outputs for input number `step` of those that lie together.
vf column(const float* at, int) { return load(at); }
vf column(const f16* at, int) { return load(at); }
vf column(const bf16* at, int step) {
    vu words;
    memcpy(&words, at, sizeof words);
    return (vf)(step ? words & 0xffff0000u : words << 16);
}

template <class T>
vf multiply_add(const T*, vf weights, const float* x, vf sum) {
    return fma(splat(*x), weights, sum);
}

#if defined(__AVX512BF16__)
// Two inputs of bf16 as one: the second is added first, each sum rounded by itself. What is less than 2^-126 counts as 0.
struct Pair {
    bf16 inputs[2];
};
vf column(const Pair* at, int) { return load((const float*)at); }
vf multiply_add(const Pair*, vf weights, const float* x, vf sum) {
    int32_t word;
    memcpy(&word, x, sizeof word);
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weights, (__m512bh)_mm512_set1_epi32(word));
}
#endif

// Adds one input of R rows, times the tiles' weights for it.
template <int R, int Parts, class T>
void add_products(const T* const* weights, int64_t at, int step, const float* x, vf (&sums)[R][Parts]) {
    vf columns[Parts];
#pragma GCC unroll 8
    for (int i = 0; i < Parts; ++i)
        columns[i] = column(weights[i / kParts] + at + i % kParts * kWidth * kStep<T>, step);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int i = 0; i < Parts; ++i) sums[r][i] = multiply_add(weights[0], columns[i], x + r, sums[r][i]);
}

// x is [inputs][R]: the R rows' inputs side by side.
template <int R, int Tiles, class T>
void multiply(const T* const* tiles, const float* x, int64_t inputs, float (*out)[kRows][kTile]) {
    constexpr int kStep = TINY_ISA::kStep<T>, kAll = Tiles * kParts;
    const T* weights[Tiles];
    for (int t = 0; t < Tiles; ++t) weights[t] = tiles[t];
    vf sums[R][kAll] = {};
    int64_t k = 0;
    for (; k + kStep <= inputs; k += kStep) {
        for (int t = 0; t < Tiles; ++t) ask_ahead<R>(weights[t] + k * kTile);
        for (int step = 0; step < kStep; ++step, x += R) add_products<R, kAll>(weights, k * kTile, step, x, sums);
    }
    if (k < inputs) add_products<R, kAll>(weights, k * kTile, 0, x, sums);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int i = 0; i < kAll; ++i) store(out[i / kParts][r] + i % kParts * kWidth, sums[r][i]);
}

template <int R, class T>
void multiply_pair(const T* const* weights, const float* x, int64_t inputs, Sums& sums) {
    for (int t = 0; t < 2; t += kTiles) multiply<R, kTiles, T>(weights + t, x, inputs, sums.at + t);
}

template <class T, int R = 1>
void multiply_rows(int64_t rows, const T* const* weights, const float* x, int64_t inputs, Sums& sums) {
    if constexpr (R < kRows)
        if (rows > R) return multiply_rows<T, R + 1>(rows, weights, x, inputs, sums);
    multiply_pair<R>(weights, x, inputs, sums);
}

// Rows in blocks of nearly one size, each packed as `multiply` reads it.
struct Blocks {
    int64_t first_row, rows, inputs, count;
    const float* packed;

    int64_t begin(int64_t block) const { return rows * block / count; }
};

// Whether x is rounded to bf16, as the weights are, and goes by pairs of inputs.
#if defined(__AVX512BF16__)
bool by_pairs(const Linear& a) {
    for (int i = 0; i < a.count; ++i)
        if (a.matrices[i].kind != Kind::bf16 || a.matrices[i].exact) return false;
    return true;
}

// At most 32 inputs of a row as pairs, in which what lacks is 0.
vf round_pairs(const float* x, int64_t count) {
    const int64_t more = count - kWidth;
    const vf low = more < 0 ? load_part(x, count, 0) : load(x);
    const vf high = more <= 0 ? vf{} : more < kWidth ? load_part(x + kWidth, more, 0) : load(x + kWidth);
    return (vf)(__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}

void pack_pairs(const Linear& a, int64_t first, int64_t rows, float* out) {
    const int64_t inputs = a.matrices[0].columns;
    for (int64_t k = 0; k < inputs; k += 2 * kWidth, out += kWidth * rows)
        for (int64_t r = 0; r < rows; ++r) {
            const vf pairs = round_pairs(a.x + source_of(a, first + r) * inputs + k, inputs - k);
            for (int64_t i = 0; i < kWidth && k + 2 * i < inputs; ++i) out[i * rows + r] = pairs[i];
        }
}
#else
bool by_pairs(const Linear&) { return false; }
void pack_pairs(const Linear&, int64_t, int64_t, float*) {}
#endif

void pack_rows(const Linear& a, int64_t first, int64_t rows, float* out) {
    const int64_t inputs = a.matrices[0].columns;
    const float* x[kRows];
    for (int64_t r = 0; r < rows; ++r) x[r] = a.x + source_of(a, first + r) * inputs;
    for (int64_t k = 0; k < inputs; ++k)
        for (int64_t r = 0; r < rows; ++r) *out++ = x[r][k];
}

Blocks pack_blocks(const Linear& a, int64_t first_row, int64_t rows) {
    const int64_t columns = a.matrices[0].columns;
    const bool pairs = by_pairs(a);
    const int64_t inputs = pairs ? (columns + 1) / 2 : columns;
    Blocks blocks{first_row, rows, inputs, (rows + kRows - 1) / kRows, a.x + source_of(a, first_row) * columns};
    if (rows == 1 && !pairs) return blocks;  // one row is packed as it lies
    float* packed = static_cast<float*>(scratch(kScratchSlot, rows * inputs * sizeof(float)));
    parallel_for(blocks.count, 1 + 65536 / (kRows * (inputs + 1)), [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
            const int64_t row = blocks.begin(block), count = blocks.begin(block + 1) - row;
            (pairs ? pack_pairs : pack_rows)(a, first_row + row, count, packed + row * inputs);
        }
    });
    blocks.packed = packed;
    return blocks;
}

// Two tiles that are made at once: neighbours, the last perhaps without one, or a gate and its up.
struct TilePair {
    const Linear& a;
    int matrix;
    int64_t tile, expert;

    int count() const { return a.gated || tile + 1 < tiles(a.matrices[matrix]) ? 2 : 1; }
    const char* weights(int i) const {
        const Matrix& m = a.matrices[a.gated ? i : matrix];
        return m.data + tile_bytes(m) * (expert * tiles(m) + (a.gated ? tile : tile + i));
    }
    void write(Sums& sums, int64_t row, int rows) const {
        if (a.gated) return finish_tile(a, 0, tile, row, rows, sums.at[0][0], sums.at[1][0]);
        for (int i = 0; i < count(); ++i) finish_tile(a, matrix, tile + i, row, rows, sums.at[i][0], nullptr);
    }
};

template <class T>
void run_typed(const TilePair& pair, const Blocks& blocks, int64_t from, int64_t until) {
    const T* weights[2];
    for (int i = 0; i < 2; ++i) weights[i] = (const T*)pair.weights(i < pair.count() ? i : 0);
    Sums sums;
    for (int64_t block = from; block < until; ++block) {
        const int64_t row = blocks.begin(block), rows = blocks.begin(block + 1) - row;
        multiply_rows(rows, weights, blocks.packed + row * blocks.inputs, blocks.inputs, sums);
        pair.write(sums, blocks.first_row + row, (int)rows);
    }
}

void run_pair(const TilePair& pair, const Blocks& blocks, int64_t from, int64_t until) {
#if defined(__AVX512BF16__)
    if (by_pairs(pair.a)) return run_typed<Pair>(pair, blocks, from, until);
#endif
    const Kind kind = pair.a.matrices[pair.matrix].kind;
    if (kind == Kind::bf16) return run_typed<bf16>(pair, blocks, from, until);
    if (kind == Kind::f16) return run_typed<f16>(pair, blocks, from, until);
    run_typed<float>(pair, blocks, from, until);
}

// The pairs are numbered through all matrices.
int64_t pairs_in(const Linear& a, int matrix) {
    return a.gated ? tiles(a.matrices[0]) : (tiles(a.matrices[matrix]) + 1) / 2;
}

int64_t count_pairs(const Linear& a) {
    int64_t count = 0;
    for (int i = 0; i < (a.gated ? 1 : a.count); ++i) count += pairs_in(a, i);
    return count;
}

TilePair find_pair(const Linear& a, int64_t number, int64_t expert) {
    int matrix = 0;
    while (number >= pairs_in(a, matrix)) number -= pairs_in(a, matrix++);
    return {a, matrix, a.gated ? number : 2 * number, expert};
}

// Every thread gets some work even where there are few tiles: then the row blocks are shared out too.
void run_chunk(const Linear& a, int64_t first_row, int64_t rows, int64_t expert) {
    const int64_t count = count_pairs(a), wanted = 4 * num_threads();
    if (count == 0) return;
    const Blocks blocks = pack_blocks(a, first_row, rows);
    const int64_t wanted_splits = (wanted + count - 1) / count;
    const int64_t splits = wanted_splits < blocks.count ? wanted_splits : blocks.count;
    const int64_t grain = 1 + 16384 * splits / (blocks.inputs * (rows + 7) + 1);
    parallel_for(count * splits, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t part = i % splits, from = blocks.count * part / splits;
            run_pair(find_pair(a, i / splits, expert), blocks, from, blocks.count * (part + 1) / splits);
        }
    });
}

}  // namespace

void dense_matmul(const Linear& a) {
#if defined(__AVX512VNNI__) && !defined(__AVX512BF16__)
    if (isa() == Isa::avx512bf16) return avx512bf16::dense_matmul(a);
#endif
    const Part all{0, a.rows, 0};
    for (int64_t p = 0; p < (a.parts ? a.part_count : 1); ++p) {
        const Part& part = a.parts ? a.parts[p] : all;
        const int64_t chunks = (part.rows + kChunk - 1) / kChunk;
        for (int64_t i = 0; i < chunks; ++i) {
            const int64_t row = part.rows * i / chunks;
            run_chunk(a, part.first + row, part.rows * (i + 1) / chunks - row, part.expert);
        }
    }
}

}  // namespace tiny_llm::TINY_ISA
