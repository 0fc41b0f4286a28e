// x [T, I] times a matrix [O, I] of 4 or 8 bits in groups: each weight is read once for R rows of x.
// A simdgroup makes COLUMNS outputs of R rows. A lane sums the packs lane, lane + 32, ... of a matrix row, then the
// simdgroup sums its lanes: the order is that of the width I alone, so one row and many have the same bits.

// kernel quantized_matmul(x, packed, scales, biases, rows, outputs) -> (out)
    constexpr int WEIGHTS = 32 / BITS;
    constexpr uint MASK = (1u << BITS) - 1;
    constexpr int PACKS = I / WEIGHTS;
    uint lane = thread_index_in_simdgroup;
    int column = int(thread_position_in_grid.y) * COLUMNS;
    int row = int(thread_position_in_grid.z) * R;

    float sums[R][COLUMNS];
    for (int r = 0; r < R; r++) {
        for (int c = 0; c < COLUMNS; c++) {
            sums[r][c] = 0.0f;
        }
    }
    for (int pack = int(lane); pack < PACKS; pack += 32) {
        int group = pack * WEIGHTS / GROUP;
        float weights[COLUMNS][WEIGHTS];
        for (int c = 0; c < COLUMNS; c++) {
            ulong o = min(column + c, outputs - 1);  // past the end: computed with the last, and not stored
            uint bits = packed[o * PACKS + pack];
            float scale = static_cast<float>(scales[o * (I / GROUP) + group]);
            float bias = static_cast<float>(biases[o * (I / GROUP) + group]);
            for (int w = 0; w < WEIGHTS; w++) {
                weights[c][w] = scale * static_cast<float>((bits >> (w * BITS)) & MASK) + bias;
            }
        }
        for (int r = 0; r < R; r++) {
            ulong at = ulong(min(row + r, rows - 1)) * I + pack * WEIGHTS;
            for (int w = 0; w < WEIGHTS; w++) {
                float value = static_cast<float>(x[at + w]);
                for (int c = 0; c < COLUMNS; c++) {
                    sums[r][c] += value * weights[c][w];
                }
            }
        }
    }
    for (int r = 0; r < R; r++) {
        for (int c = 0; c < COLUMNS; c++) {
            float sum = simd_sum(sums[r][c]);
            if (lane == 0 && row + r < rows && column + c < outputs) {
                out[ulong(row + r) * outputs + column + c] = static_cast<T>(sum);
            }
        }
    }
