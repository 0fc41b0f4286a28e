// x [T, I] times a matrix [O, I] of 4 or 8 bits in groups, for many rows: by 8 x 8 matrices of a simdgroup.
// A threadgroup makes 8 * M rows of 8 * N outputs. Its 8 simdgroups are the 8 parts of quantized_matmul's order: each
// takes every eighth chunk of 32 weights. So the inputs are split whatever the grid is, by their number alone, and a
// simdgroup needs nothing from another until its part is done: each lane unpacks the weights of its own places of a
// matrix, with no threadgroup memory and no barrier on the way.
// Apple does not say in which order the hardware sums the 8 products of a place. Where it is a chain of fma in order,
// as in metalsim, a row has the bits of quantized_matmul; ops/quantized_matmul.py asks the device before it uses this.
// Float throughout: on Apple's GPUs half is no faster here, and weights rounded to it would not be those of one row.
#include <metal_simdgroup_matrix>

// kernel quantized_matmul_tile(x, packed, scales, biases, rows, outputs) -> (out)
    constexpr int WEIGHTS = 32 / BITS;  // in a word; a chunk has BITS words
    constexpr uint MASK = (1u << BITS) - 1;
    constexpr int CHUNKS = I / 32;
    constexpr int PARTS = 8;
    threadgroup float others[PARTS / 2 * M * N * 64];
    int lane = int(thread_index_in_simdgroup);
    int part = int(simdgroup_index_in_threadgroup);
    int down = (lane / 4 & 4) + lane / 2 % 4;  // a lane's places in a matrix: (down, right) and the next one
    int right = (lane / 4 & 2) * 2 + lane % 2 * 2;
    int row = int(threadgroup_position_in_grid.x) * (8 * M) + down;
    int column = int(threadgroup_position_in_grid.y) * (8 * N) + right;

    simdgroup_matrix<float, 8, 8> sums[M][N];
    for (int m = 0; m < M; m++) {
        for (int n = 0; n < N; n++) {
            sums[m][n] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
        }
    }
    for (int chunk = part; chunk < CHUNKS; chunk += PARTS) {
        float scale[N][2], bias[N][2];
        ulong words[N][2];
        for (int n = 0; n < N; n++) {
            for (int i = 0; i < 2; i++) {
                ulong o = min(column + n * 8 + i, outputs - 1);  // past the end: the last one, and not stored
                ulong group = o * (I / GROUP) + chunk * 32 / GROUP;
                scale[n][i] = static_cast<float>(scales[group]);
                bias[n][i] = static_cast<float>(biases[group]);
                words[n][i] = (o * CHUNKS + chunk) * BITS;
            }
        }
        for (int k = 0; k < 32; k += 8) {
            simdgroup_matrix<float, 8, 8> values[M];
            for (int m = 0; m < M; m++) {
                ulong at = ulong(min(row + m * 8, rows - 1)) * I + chunk * 32 + k + right;
                values[m].thread_elements()[0] = static_cast<float>(x[at]);
                values[m].thread_elements()[1] = static_cast<float>(x[at + 1]);
            }
            for (int n = 0; n < N; n++) {
                simdgroup_matrix<float, 8, 8> weights;
                for (int i = 0; i < 2; i++) {
                    uint bits = packed[words[n][i] + (k + down) / WEIGHTS];
                    uint number = (bits >> ((k + down) % WEIGHTS * BITS)) & MASK;
                    weights.thread_elements()[i] = fma(scale[n][i], static_cast<float>(number), bias[n][i]);
                }
                for (int m = 0; m < M; m++) {
                    simdgroup_multiply_accumulate(sums[m][n], values[m], weights, sums[m][n]);
                }
            }
        }
    }

    // In pairs, as the lanes of one row. A part writes where only it has read before: one barrier a round.
    for (int apart = 1; apart < PARTS; apart *= 2) {
        int partner = part + apart;
        if (part % (2 * apart) == apart) {
            for (int m = 0; m < M; m++) {
                for (int n = 0; n < N; n++) {
                    int at = (part / 2 * M * N + m * N + n) * 64 + lane * 2;
                    others[at] = sums[m][n].thread_elements()[0];
                    others[at + 1] = sums[m][n].thread_elements()[1];
                }
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (part % (2 * apart) == 0) {
            for (int m = 0; m < M; m++) {
                for (int n = 0; n < N; n++) {
                    int at = (partner / 2 * M * N + m * N + n) * 64 + lane * 2;
                    sums[m][n].thread_elements()[0] += others[at];
                    sums[m][n].thread_elements()[1] += others[at + 1];
                }
            }
        }
    }
    if (part == 0) {
        for (int m = 0; m < M; m++) {
            for (int n = 0; n < N; n++) {
                for (int i = 0; i < 2; i++) {
                    if (row + m * 8 < rows && column + n * 8 + i < outputs) {
                        ulong at = ulong(row + m * 8) * outputs + column + n * 8 + i;
                        out[at] = static_cast<T>(sums[m][n].thread_elements()[i]);
                    }
                }
            }
        }
    }
