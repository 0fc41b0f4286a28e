// x [T, I] times a matrix [O, I] of 4 or 8 bits in groups: each weight is read once for R rows of x.
// The order of a sum is that of the width I alone, so one row and many have the same bits: chunks of 32 weights go
// to 8 parts in turn; a part is a chain of fma in order of its inputs; the parts are added in pairs. Nothing here
// but a lane a part: 8 lanes side by side read 8 chunks side by side. quantized_matmul_tile has the same order.
// A lane loads a chunk's weights by 16 bytes, its inputs by 4. A weight's bits are not moved: the scale is divided
// by what they are worth there, a power of two, which changes no bit of the product.

// begin 2.4 add_chunk
// Adds a chunk of 32 inputs of R rows of x, from `row` on, times two outputs' weights. A weight is taken out of its
// word once, whatever R is. Rows past the end are the last one.
template <int I, int BITS, int R, typename T>
inline void add_chunk(
    const device T* x,
    int row,
    int rows,
    int chunk,
    thread const uint (&words)[2][BITS],
    thread const float (&scale)[2],
    thread const float (&bias)[2],
    thread float (&sums)[R][2]) {
    constexpr int WEIGHTS = 32 / BITS;  // in a word
    float scales[2][WEIGHTS];
    UNROLL for (int c = 0; c < 2; c++) {
        UNROLL for (int w = 0; w < WEIGHTS; w++) {
            scales[c][w] = scale[c] * (1.0f / static_cast<float>(1u << (w * BITS)));
        }
    }
    UNROLL for (int k = 0; k < 32; k += 4) {
        float weights[2][4];
        UNROLL for (int c = 0; c < 2; c++) {
            uint word = words[c][k / WEIGHTS];
            UNROLL for (int i = 0; i < 4; i++) {
                int w = k % WEIGHTS + i;
                uint number = word & (((1u << BITS) - 1) << (w * BITS));
                weights[c][i] = fma(scales[c][w], static_cast<float>(number), bias[c]);
            }
        }
        UNROLL for (int r = 0; r < R; r++) {
            ulong at = ulong(min(row + r, rows - 1)) * I + chunk * 32 + k;
            vec<T, 4> values = *(const device vec<T, 4>*)(x + at);
            UNROLL for (int i = 0; i < 4; i++) {
                float value = static_cast<float>(values[i]);
                UNROLL for (int c = 0; c < 2; c++) {
                    sums[r][c] = fma(value, weights[c][i], sums[r][c]);
                }
            }
        }
    }
}
// end 2.4

// begin 2.4 add_rows
// A lane's part of R rows of x times two rows of one matrix, or one of each of two; then, in each of the 8 lanes
// that share the two outputs, all parts' sum.
template <int I, int BITS, int GROUP, int R, typename T, typename S>
inline void add_rows(
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
    int part,
    thread float (&sums)[R][2]) {
    constexpr int CHUNKS = I / 32;
    UNROLL for (int r = 0; r < R; r++) {
        sums[r][0] = 0.0f;
        sums[r][1] = 0.0f;
    }
    for (int chunk = part; chunk < CHUNKS; chunk += 8) {
        float scale[2], bias[2];
        uint words[2][BITS];  // of the chunk
        UNROLL for (int c = 0; c < 2; c++) {
            ulong column = c == 0 ? column_0 : column_1;
            ulong group = column * (I / GROUP) + chunk * 32 / GROUP;
            scale[c] = static_cast<float>(c == 0 ? scales_0[group] : scales_1[group]);
            bias[c] = static_cast<float>(c == 0 ? biases_0[group] : biases_1[group]);
            const device uint* at = (c == 0 ? packed_0 : packed_1) + (column * CHUNKS + chunk) * BITS;
            UNROLL for (int i = 0; i < BITS; i += 4) {
                uint4 four = *(const device uint4*)(at + i);
                UNROLL for (int j = 0; j < 4; j++) {
                    words[c][i + j] = four[j];
                }
            }
        }
        add_chunk<I, BITS>(x, row, rows, chunk, words, scale, bias, sums);
    }
    UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int c = 0; c < 2; c++) {
            for (ushort apart = 1; apart < 8; apart *= 2) {
                sums[r][c] += simd_shuffle_xor(sums[r][c], apart);
            }
        }
    }
}
// end 2.4

// A sum as it is stored: the bias is added to what was rounded.
template <typename T, bool BIAS, typename B>
inline T biased(float sum, B bias, int column) {
    T rounded = static_cast<T>(sum);
    return BIAS ? static_cast<T>(static_cast<float>(rounded) + static_cast<float>(bias[column])) : rounded;
}

// begin 2.4 store_rows
// Stores the sums of rows from `row` and of the outputs `column` and `column + 4` that there are: of 8 lanes, one.
template <bool BIAS, int R, typename T, typename B>
inline void store_rows(
    thread const float (&sums)[R][2], device T* out, B bias, int row, int rows, int column, int outputs, int part) {
    UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int c = 0; c < 2; c++) {
            int o = column + c * 4;
            if (part == 0 && row + r < rows && o < outputs) {
                out[ulong(row + r) * outputs + o] = biased<T, BIAS>(sums[r][c], bias, o);
            }
        }
    }
}
// end 2.4

// kernel quantized_matmul(x, packed, scales, biases, bias, rows, outputs) -> (out)
    int lane = int(thread_index_in_simdgroup);
    int column = int(thread_position_in_grid.y) * 8 + lane / 8;  // a simdgroup makes 8 outputs of R rows
    int row = int(thread_position_in_grid.z) * R;
    int first = min(column, outputs - 1), second = min(column + 4, outputs - 1);  // past the end: not stored
    float sums[R][2];
    add_rows<I, BITS, GROUP>(
        x, row, rows, packed, packed, scales, scales, biases, biases, first, second, lane % 8, sums);
    store_rows<BIAS>(sums, out, bias, row, rows, column, outputs, lane % 8);

// kernel quantized_matmul_three(x, packed_0, scales_0, biases_0, bias_0, packed_1, scales_1, biases_1, bias_1, packed_2, scales_2, biases_2, bias_2, rows, outputs_0, outputs_1, outputs_2) -> (out_0, out_1, out_2)
    int lane = int(thread_index_in_simdgroup);
    int group = int(thread_position_in_grid.y);
    int groups_0 = (outputs_0 + 7) / 8, groups_1 = (outputs_1 + 7) / 8;
    int m = group < groups_0 ? 0 : group < groups_0 + groups_1 ? 1 : 2;  // a simdgroup's matrix
    group -= m == 0 ? 0 : m == 1 ? groups_0 : groups_0 + groups_1;
    const device uint* packed = m == 0 ? packed_0 : m == 1 ? packed_1 : packed_2;
    const device S* scales = m == 0 ? scales_0 : m == 1 ? scales_1 : scales_2;
    const device S* biases = m == 0 ? biases_0 : m == 1 ? biases_1 : biases_2;
    const device T* bias = m == 0 ? bias_0 : m == 1 ? bias_1 : bias_2;
    device T* out = m == 0 ? out_0 : m == 1 ? out_1 : out_2;
    int outputs = m == 0 ? outputs_0 : m == 1 ? outputs_1 : outputs_2;
    int column = group * 8 + lane / 8;
    int row = int(thread_position_in_grid.z) * R;
    int first = min(column, outputs - 1), second = min(column + 4, outputs - 1);
    float sums[R][2];
    add_rows<I, BITS, GROUP>(
        x, row, rows, packed, packed, scales, scales, biases, biases, first, second, lane % 8, sums);
    store_rows<BIAS>(sums, out, bias, row, rows, column, outputs, lane % 8);

// kernel quantized_matmul_gated(x, packed_0, scales_0, biases_0, bias_0, packed_1, scales_1, biases_1, bias_1, rows, outputs) -> (out)
    int lane = int(thread_index_in_simdgroup);
    int column = int(thread_position_in_grid.y) * 4 + lane / 8;  // 4 of the gate's, and the same 4 of the other's
    int row = int(thread_position_in_grid.z) * R;
    int inside = min(column, outputs - 1);
    float sums[R][2];
    add_rows<I, BITS, GROUP>(
        x, row, rows, packed_0, packed_1, scales_0, scales_1, biases_0, biases_1, inside, inside, lane % 8, sums);
    UNROLL for (int r = 0; r < R; r++) {
        if (lane % 8 == 0 && row + r < rows && column < outputs) {
            float gate = static_cast<float>(biased<T, BIAS>(sums[r][0], bias_0, column));
            T silu = static_cast<T>(gate / (1.0f + metal::precise::exp(-gate)));
            T up = biased<T, BIAS>(sums[r][1], bias_1, column);
            out[ulong(row + r) * outputs + column] = static_cast<T>(silu * up);
        }
    }

// kernel quantized_matmul_experts(x, packed, scales, biases, experts, starts, rows, outputs) -> (out)
    // Rows are sorted by expert, or R is 1. Of each expert's rows every R-th begins a block, and reads its matrix.
    int lane = int(thread_index_in_simdgroup);
    int column = int(thread_position_in_grid.y) * 8 + lane / 8;
    int row = int(thread_position_in_grid.z);
    int expert = int(experts[row]);
    if ((row - int(starts[expert])) % R == 0) {
        int end = row + 1;  // of the block
        UNROLL for (int r = 1; r < R; r++) {
            end += end == row + r && end < rows && int(experts[min(end, rows - 1)]) == expert ? 1 : 0;
        }
        ulong before = ulong(expert) * ulong(outputs);  // rows of all matrices
        auto words = packed + before * (I / 32 * BITS);
        auto own_scales = scales + before * (I / GROUP), own_biases = biases + before * (I / GROUP);
        int first = min(column, outputs - 1), second = min(column + 4, outputs - 1);
        float sums[R][2];
        add_rows<I, BITS, GROUP>(
            x, row, end, words, words, own_scales, own_scales, own_biases, own_biases, first, second, lane % 8, sums);
        store_rows<false>(sums, out, x, row, end, column, outputs, lane % 8);
    }

// kernel quantized_matmul_experts_gated(x, packed_0, scales_0, biases_0, packed_1, scales_1, biases_1, experts, starts, rows, outputs) -> (out)
    int lane = int(thread_index_in_simdgroup);
    int column = int(thread_position_in_grid.y) * 4 + lane / 8;
    int row = int(thread_position_in_grid.z);
    int expert = int(experts[row]);
    if ((row - int(starts[expert])) % R == 0) {
        int end = row + 1;
        UNROLL for (int r = 1; r < R; r++) {
            end += end == row + r && end < rows && int(experts[min(end, rows - 1)]) == expert ? 1 : 0;
        }
        ulong before = ulong(expert) * ulong(outputs);
        auto words_0 = packed_0 + before * (I / 32 * BITS), words_1 = packed_1 + before * (I / 32 * BITS);
        auto own_scales_0 = scales_0 + before * (I / GROUP), own_scales_1 = scales_1 + before * (I / GROUP);
        auto own_biases_0 = biases_0 + before * (I / GROUP), own_biases_1 = biases_1 + before * (I / GROUP);
        int inside = min(column, outputs - 1);
        float sums[R][2];
        add_rows<I, BITS, GROUP>(
            x, row, end, words_0, words_1, own_scales_0, own_scales_1, own_biases_0, own_biases_1, inside, inside,
            lane % 8, sums);
        UNROLL for (int r = 0; r < R; r++) {
            if (lane % 8 == 0 && row + r < end && column < outputs) {
                float gate = static_cast<float>(static_cast<T>(sums[r][0]));
                T silu = static_cast<T>(gate / (1.0f + metal::precise::exp(-gate)));
                out[ulong(row + r) * outputs + column] = static_cast<T>(silu * static_cast<T>(sums[r][1]));
            }
        }
    }
