// x [T, I] times a matrix [O, I] of 4 or 8 bits in groups: each weight is read once for R rows of x.
// The order of a sum is that of the width I alone, so one row and many have the same bits: chunks of 32 weights go
// to 8 parts in turn; a part is a chain of fma in order of its inputs; the parts are added in pairs. Nothing here
// but a lane a part: 8 lanes side by side read 8 chunks side by side. quantized_matmul_tile has the same order.
// A simdgroup makes 4 * COLUMNS outputs of R rows.

// kernel quantized_matmul(x, packed, scales, biases, rows, outputs) -> (out)
    constexpr int WEIGHTS = 32 / BITS;  // in a word; a chunk has BITS words
    constexpr uint MASK = (1u << BITS) - 1;
    constexpr int CHUNKS = I / 32;
    int lane = int(thread_index_in_simdgroup);
    int column = int(thread_position_in_grid.y) * (4 * COLUMNS) + lane / 8;
    int row = int(thread_position_in_grid.z) * R;

    float sums[R][COLUMNS];
    for (int r = 0; r < R; r++) {
        for (int c = 0; c < COLUMNS; c++) {
            sums[r][c] = 0.0f;
        }
    }
    for (int chunk = lane % 8; chunk < CHUNKS; chunk += 8) {
        float scale[COLUMNS], bias[COLUMNS];
        ulong matrix_row[COLUMNS];
        for (int c = 0; c < COLUMNS; c++) {
            matrix_row[c] = min(column + c * 4, outputs - 1);  // past the end: the last one, and not stored
            ulong group = matrix_row[c] * (I / GROUP) + chunk * 32 / GROUP;
            scale[c] = static_cast<float>(scales[group]);
            bias[c] = static_cast<float>(biases[group]);
        }
        for (int word = 0; word < BITS; word++) {
            float weights[COLUMNS][WEIGHTS];
            for (int c = 0; c < COLUMNS; c++) {
                uint bits = packed[(matrix_row[c] * CHUNKS + chunk) * BITS + word];
                for (int w = 0; w < WEIGHTS; w++) {
                    weights[c][w] = fma(scale[c], static_cast<float>((bits >> (w * BITS)) & MASK), bias[c]);
                }
            }
            for (int r = 0; r < R; r++) {
                ulong at = ulong(min(row + r, rows - 1)) * I + chunk * 32 + word * WEIGHTS;
                for (int w = 0; w < WEIGHTS; w++) {
                    float value = static_cast<float>(x[at + w]);
                    for (int c = 0; c < COLUMNS; c++) {
                        sums[r][c] = fma(value, weights[c][w], sums[r][c]);
                    }
                }
            }
        }
    }
    for (int r = 0; r < R; r++) {
        for (int c = 0; c < COLUMNS; c++) {
            float sum = sums[r][c];
            for (ushort apart = 1; apart < 8; apart *= 2) {
                sum += simd_shuffle_xor(sum, apart);
            }
            if (lane % 8 == 0 && row + r < rows && column + c * 4 < outputs) {
                out[ulong(row + r) * outputs + column + c * 4] = static_cast<T>(sum);
            }
        }
    }
