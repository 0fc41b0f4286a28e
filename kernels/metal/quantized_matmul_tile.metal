// x [T, I] times a matrix [O, I] of 4 or 8 bits in groups, for many rows: by 8 x 8 matrices of a simdgroup.
// A threadgroup makes 8 * M rows of 8 * N outputs. Its 8 simdgroups are the 8 parts of quantized_matmul's order: each
// takes every eighth chunk of 32 weights. So the inputs are split whatever the grid is, by their number alone, and a
// simdgroup needs nothing from another until its part is done: each lane unpacks the weights of its own places of a
// matrix, with no threadgroup memory and no barrier on the way.
// Apple does not say in which order the hardware sums the 8 products of a place. Where it is a chain of fma in order,
// as in metalsim, a row has the bits of quantized_matmul; the op asks the device before it uses this.
// Float throughout: on Apple's GPUs half is no faster here, and weights rounded to it would not be those of one row.
#include <metal_simdgroup_matrix>

constant constexpr int PARTS = 8;

// What this lane needs of a chunk of the matrix, for its two places of each of N matrices: the words, of which it has use
// for one number in each, and scale and bias of the two outputs. Numbers are not moved to the lowest bits: the scale is
// divided by what they are worth where they stand.
template <int I, int BITS, int GROUP, int N, typename S>
inline void load_chunk(
    const device uint* packed_0,
    const device uint* packed_1,
    S scales_0,
    S scales_1,
    S biases_0,
    S biases_1,
    int column_0,
    int column_1,
    int outputs,
    int chunk,
    int down,
    thread uint (&words)[N][2][4],
    thread float (&scale)[N][2],
    thread float (&bias)[N][2]) {
    constexpr int WEIGHTS = 32 / BITS;  // in a word; a chunk has BITS words
    float worth = 1.0f / static_cast<float>(1u << (down % WEIGHTS * BITS));
    UNROLL for (int n = 0; n < N; n++) {
        bool second = n >= N / 2;
        int column = second ? column_1 + (n - N / 2) * 8 : column_0 + n * 8;
        const device uint* packed = second ? packed_1 : packed_0;
        UNROLL for (int i = 0; i < 2; i++) {
            ulong o = min(column + i, outputs - 1);  // past the end: the last one, and not stored
            ulong group = o * (I / GROUP) + chunk * 32 / GROUP;
            scale[n][i] = static_cast<float>(second ? scales_1[group] : scales_0[group]) * worth;
            bias[n][i] = static_cast<float>(second ? biases_1[group] : biases_0[group]);
            const device uint* at = packed + (o * (I / 32) + chunk) * BITS;
            if (BITS == 4) {
                uint4 four = *(const device uint4*)at;
                UNROLL for (int j = 0; j < 4; j++) {
                    words[n][i][j] = four[j];
                }
            } else {
                UNROLL for (int j = 0; j < 4; j++) {
                    words[n][i][j] = at[j * 2 + down / WEIGHTS];
                }
            }
        }
    }
}

// begin 2.8 multiply_chunk
// A chunk's 32 inputs times its weights, added to the sums of 8 * M rows and 8 * N outputs. A lane makes the weight of
// each of its places once, for all rows: step k / 8 has its number in words[n][i][k / 8], `down` numbers up.
template <int I, int BITS, int M, int N, typename T>
inline void multiply_chunk(
    const device T* x,
    int row,
    int rows,
    int chunk,
    int down,
    int right,
    thread const uint (&words)[N][2][4],
    thread const float (&scale)[N][2],
    thread const float (&bias)[N][2],
    thread simdgroup_matrix<float, 8, 8> (&sums)[M][N]) {
    uint mask = ((1u << BITS) - 1) << uint(down % (32 / BITS) * BITS);
    UNROLL for (int k = 0; k < 32; k += 8) {
        simdgroup_matrix<float, 8, 8> values[M];
        UNROLL for (int m = 0; m < M; m++) {
            ulong at = ulong(min(row + m * 8, rows - 1)) * I + chunk * 32 + k + right;
            vec<T, 2> pair = *(const device vec<T, 2>*)(x + at);
            values[m].thread_elements()[0] = static_cast<float>(pair[0]);
            values[m].thread_elements()[1] = static_cast<float>(pair[1]);
        }
        UNROLL for (int n = 0; n < N; n++) {
            simdgroup_matrix<float, 8, 8> weights;
            UNROLL for (int i = 0; i < 2; i++) {
                float number = static_cast<float>(words[n][i][k / 8] & mask);
                weights.thread_elements()[i] = fma(scale[n][i], number, bias[n][i]);
            }
            UNROLL for (int m = 0; m < M; m++) {
                simdgroup_multiply_accumulate(sums[m][n], values[m], weights, sums[m][n]);
            }
        }
    }
}
// end 2.8

// begin 2.8 add_tiles
// A simdgroup's part of a tile: N / 2 matrices across from each of two columns, of one matrix or of two.
template <int I, int BITS, int GROUP, int M, int N, typename T, typename S>
inline void add_tiles(
    const device T* x,
    int row,
    int rows,
    const device uint* packed_0,
    const device uint* packed_1,
    S scales_0,
    S scales_1,
    S biases_0,
    S biases_1,
    int column_0,
    int column_1,
    int outputs,
    int part,
    int down,
    int right,
    thread simdgroup_matrix<float, 8, 8> (&sums)[M][N]) {
    UNROLL for (int m = 0; m < M; m++) {
        UNROLL for (int n = 0; n < N; n++) {
            sums[m][n] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
        }
    }
    for (int chunk = part; chunk < I / 32; chunk += PARTS) {
        uint words[N][2][4];
        float scale[N][2], bias[N][2];
        load_chunk<I, BITS, GROUP, N>(packed_0, packed_1, scales_0, scales_1, biases_0, biases_1, column_0, column_1,
            outputs, chunk, down, words, scale, bias);
        multiply_chunk<I, BITS, M, N>(x, row, rows, chunk, down, right, words, scale, bias, sums);
    }
}
// end 2.8

// begin 2.8 add_parts
// The parts' sums, in the first: in pairs, as the lanes of one row. A part writes where only it has read before: one
// barrier a round.
template <int M, int N>
inline void add_parts(
    thread simdgroup_matrix<float, 8, 8> (&sums)[M][N], threadgroup float* others, int part, int lane) {
    for (int apart = 1; apart < PARTS; apart *= 2) {
        int partner = part + apart;
        if (part % (2 * apart) == apart) {
            UNROLL for (int m = 0; m < M; m++) {
                UNROLL for (int n = 0; n < N; n++) {
                    int at = (part / 2 * M * N + m * N + n) * 64 + lane * 2;
                    others[at] = sums[m][n].thread_elements()[0];
                    others[at + 1] = sums[m][n].thread_elements()[1];
                }
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (part % (2 * apart) == 0) {
            UNROLL for (int m = 0; m < M; m++) {
                UNROLL for (int n = 0; n < N; n++) {
                    int at = (partner / 2 * M * N + m * N + n) * 64 + lane * 2;
                    sums[m][n].thread_elements()[0] += others[at];
                    sums[m][n].thread_elements()[1] += others[at + 1];
                }
            }
        }
    }
}
// end 2.8

// As in quantized_matmul.
template <typename T, bool BIAS, typename B>
inline T biased(float sum, B bias, int column) {
    T rounded = static_cast<T>(sum);
    return BIAS ? static_cast<T>(static_cast<float>(rounded) + static_cast<float>(bias[column])) : rounded;
}

// begin 2.8 store_tile
// This lane's sums of 8 * M rows from `row` on and 8 * N outputs from `column` on, as far as these exist.
template <typename T, bool BIAS, int M, int N, typename B>
inline void store_tile(
    thread simdgroup_matrix<float, 8, 8> (&sums)[M][N], device T* out, B bias, int row, int rows, int column, int outputs) {
    UNROLL for (int m = 0; m < M; m++) {
        UNROLL for (int n = 0; n < N; n++) {
            UNROLL for (int i = 0; i < 2; i++) {
                int o = column + n * 8 + i;
                if (row + m * 8 < rows && o < outputs) {
                    out[ulong(row + m * 8) * outputs + o] =
                        biased<T, BIAS>(sums[m][n].thread_elements()[i], bias, o);
                }
            }
        }
    }
}
// end 2.8

// kernel quantized_matmul_tile(x, packed, scales, biases, bias, rows, outputs) -> (out)
    threadgroup float others[PARTS / 2 * M * N * 64];
    int lane = int(thread_index_in_simdgroup);
    int part = int(simdgroup_index_in_threadgroup);
    int down = (lane / 4 & 4) + lane / 2 % 4;  // a lane's places in a matrix: (down, right) and the next one
    int right = (lane / 4 & 2) * 2 + lane % 2 * 2;
    int row = int(threadgroup_position_in_grid.x) * (8 * M) + down;
    int column = int(threadgroup_position_in_grid.y) * (8 * N) + right;
    simdgroup_matrix<float, 8, 8> sums[M][N];
    add_tiles<I, BITS, GROUP, M, N>(x, row, rows, packed, packed, scales, scales, biases, biases, column,
        column + N * 4, outputs, part, down, right, sums);
    add_parts<M, N>(sums, others, part, lane);
    if (part == 0) {
        store_tile<T, BIAS, M, N>(sums, out, bias, row, rows, column, outputs);
    }

// kernel quantized_matmul_tile_three(x, packed_0, scales_0, biases_0, bias_0, packed_1, scales_1, biases_1, bias_1, packed_2, scales_2, biases_2, bias_2, rows, outputs_0, outputs_1, outputs_2) -> (out_0, out_1, out_2)
    threadgroup float others[PARTS / 2 * M * N * 64];
    int lane = int(thread_index_in_simdgroup);
    int part = int(simdgroup_index_in_threadgroup);
    int down = (lane / 4 & 4) + lane / 2 % 4;
    int right = (lane / 4 & 2) * 2 + lane % 2 * 2;
    int tile = int(threadgroup_position_in_grid.y);
    int tiles_0 = (outputs_0 + 8 * N - 1) / (8 * N), tiles_1 = (outputs_1 + 8 * N - 1) / (8 * N);
    int matrix = tile < tiles_0 ? 0 : tile < tiles_0 + tiles_1 ? 1 : 2;  // a threadgroup's
    tile -= matrix == 0 ? 0 : matrix == 1 ? tiles_0 : tiles_0 + tiles_1;
    const device uint* packed = matrix == 0 ? packed_0 : matrix == 1 ? packed_1 : packed_2;
    const device S* scales = matrix == 0 ? scales_0 : matrix == 1 ? scales_1 : scales_2;
    const device S* biases = matrix == 0 ? biases_0 : matrix == 1 ? biases_1 : biases_2;
    const device T* bias = matrix == 0 ? bias_0 : matrix == 1 ? bias_1 : bias_2;
    device T* out = matrix == 0 ? out_0 : matrix == 1 ? out_1 : out_2;
    int outputs = matrix == 0 ? outputs_0 : matrix == 1 ? outputs_1 : outputs_2;
    int row = int(threadgroup_position_in_grid.x) * (8 * M) + down;
    int column = tile * (8 * N) + right;
    simdgroup_matrix<float, 8, 8> sums[M][N];
    add_tiles<I, BITS, GROUP, M, N>(x, row, rows, packed, packed, scales, scales, biases, biases, column,
        column + N * 4, outputs, part, down, right, sums);
    add_parts<M, N>(sums, others, part, lane);
    if (part == 0) {
        store_tile<T, BIAS, M, N>(sums, out, bias, row, rows, column, outputs);
    }

// kernel quantized_matmul_tile_gated(x, packed_0, scales_0, biases_0, bias_0, packed_1, scales_1, biases_1, bias_1, rows, outputs) -> (out)
    threadgroup float others[PARTS / 2 * M * N * 64];
    int lane = int(thread_index_in_simdgroup);
    int part = int(simdgroup_index_in_threadgroup);
    int down = (lane / 4 & 4) + lane / 2 % 4;
    int right = (lane / 4 & 2) * 2 + lane % 2 * 2;
    int row = int(threadgroup_position_in_grid.x) * (8 * M) + down;
    int column = int(threadgroup_position_in_grid.y) * (4 * N) + right;  // left half the gate's, right the other's
    simdgroup_matrix<float, 8, 8> sums[M][N];
    add_tiles<I, BITS, GROUP, M, N>(x, row, rows, packed_0, packed_1, scales_0, scales_1, biases_0, biases_1, column,
        column, outputs, part, down, right, sums);
    add_parts<M, N>(sums, others, part, lane);
    if (part == 0) {
        UNROLL for (int m = 0; m < M; m++) {
            UNROLL for (int n = 0; n < N / 2; n++) {
                UNROLL for (int i = 0; i < 2; i++) {
                    int o = column + n * 8 + i;
                    if (row + m * 8 < rows && o < outputs) {
                        float gate = static_cast<float>(biased<T, BIAS>(sums[m][n].thread_elements()[i], bias_0, o));
                        T silu = static_cast<T>(gate / (1.0f + metal::precise::exp(-gate)));
                        T up = biased<T, BIAS>(sums[m][n + N / 2].thread_elements()[i], bias_1, o);
                        out[ulong(row + m * 8) * outputs + o] = static_cast<T>(silu * up);
                    }
                }
            }
        }
    }
