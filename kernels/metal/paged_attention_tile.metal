// Attention of many query rows over the blocks of their sequence, by 8 x 8 matrices of a simdgroup: flash attention
// (Dao et al. 2022) on pages, causal by each row's own count of tokens that it sees.
// A threadgroup of PARTS simdgroups takes one key/value head and 8 * M pairs of a query row and one of the G heads
// that share it: what is read of keys and values serves all of them, and a decode row fills G of the pairs.
// The order is that of paged_attention: simdgroup p sees the blocks p, p + PARTS, ... of a span of SPAN tokens, the
// parts become one in their order, and then the spans. So a row's bits are those that paged_attention gives, where the
// matrix instruction is a chain of fma in order; ops/paged_attention.py asks the device before it uses this.
// A row sees its last `window` tokens; blocks that no row of the tile sees are not read.
// work: for each threadgroup its sequence's first row, how many rows that has, the sequence, the tokens that its
// first row sees, and the first of the threadgroup's pairs.
#include <metal_simdgroup_matrix>

// begin 2.6 lane_place
// Where in an 8 x 8 matrix a lane's two elements lie: row x, columns y and y + 1.
inline int2 lane_place(int lane) {
    return int2((lane / 4 & 4) + lane / 2 % 4, (lane / 4 & 2) * 2 + lane % 2 * 2);
}
// end 2.6

// begin 2.6 score_block
// The scores of 8 * M queries, of `query` [8 * M, D], with the S keys of a block, which lie [D, S] from `keys` on.
template <int M, int S, int D, typename P>
inline void score_block(
    const threadgroup float* query,
    const device P* keys,
    int2 place,
    thread simdgroup_matrix<float, 8, 8> (&scores)[M][S / 8]) {
    UNROLL for (int m = 0; m < M; m++) {
        UNROLL for (int j = 0; j < S / 8; j++) {
            scores[m][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
        }
    }
    for (int d = 0; d < D; d += 8) {
        simdgroup_matrix<float, 8, 8> rows[M];
        UNROLL for (int m = 0; m < M; m++) {
            int at = (m * 8 + place.x) * D + d + place.y;
            rows[m].thread_elements()[0] = query[at];
            rows[m].thread_elements()[1] = query[at + 1];
        }
        UNROLL for (int j = 0; j < S / 8; j++) {
            simdgroup_matrix<float, 8, 8> key;
            int at = (d + place.x) * S + j * 8 + place.y;
            key.thread_elements()[0] = static_cast<float>(keys[at]);
            key.thread_elements()[1] = static_cast<float>(keys[at + 1]);
            UNROLL for (int m = 0; m < M; m++) {
                simdgroup_multiply_accumulate(scores[m][j], rows[m], key, scores[m][j]);
            }
        }
    }
}
// end 2.6

// begin 2.6 soften_block
// A block's scores become weights, by the largest score that a row has seen so far; what was summed by a smaller one
// shrinks. The row of matrix m that is this lane's sees tokens [from[m], seen[m]), of which the block's first is
// `first`. Of int8, a score is times its key's unit; and a weight, once it is added up, times its value's.
template <int M, int S, int D, bool SCALED>
inline void soften_block(
    int first,
    thread const int (&from)[M],
    thread const int (&seen)[M],
    int2 place,
    thread const float (&key_units)[S / 8][2],
    thread const float (&value_units)[S / 8][2],
    thread simdgroup_matrix<float, 8, 8> (&scores)[M][S / 8],
    thread float (&top)[M],
    thread float (&total)[M],
    thread simdgroup_matrix<float, 8, 8> (&sums)[M][D / 8]) {
    UNROLL for (int m = 0; m < M; m++) {
        float best = -INFINITY;
        UNROLL for (int j = 0; j < S / 8; j++) {
            UNROLL for (int i = 0; i < 2; i++) {
                int token = first + j * 8 + place.y + i;
                bool counts = token < seen[m] && token >= from[m];
                float product = scores[m][j].thread_elements()[i];
                float score = counts ? (SCALED ? product * key_units[j][i] : product) : -INFINITY;
                scores[m][j].thread_elements()[i] = score;
                best = max(best, score);
            }
        }
        best = max(best, simd_shuffle_xor(best, ushort(1)));  // the 4 lanes that hold a row
        best = max(best, simd_shuffle_xor(best, ushort(8)));
        float higher = max(top[m], best);
        float base = higher == -INFINITY ? 0.0f : higher;  // a row that sees nothing here
        float shrink = metal::precise::exp(top[m] - base);
        float shares[4][2];  // of tokens t, t + 32, ... together, as paged_attention's lanes have them
        UNROLL for (int j = 0; j < 4; j++) {
            shares[j][0] = 0.0f;
            shares[j][1] = 0.0f;
        }
        UNROLL for (int j = 0; j < S / 8; j++) {
            UNROLL for (int i = 0; i < 2; i++) {
                float share = metal::precise::exp(scores[m][j].thread_elements()[i] - base);
                scores[m][j].thread_elements()[i] = SCALED ? share * value_units[j][i] : share;
                shares[j % 4][i] += share;
            }
        }
        float eight[4];
        UNROLL for (int j = 0; j < 4; j++) {
            eight[j] = shares[j][0] + shares[j][1];
            eight[j] += simd_shuffle_xor(eight[j], ushort(1));
            eight[j] += simd_shuffle_xor(eight[j], ushort(8));
        }
        total[m] = total[m] * shrink + ((eight[0] + eight[1]) + (eight[2] + eight[3]));
        top[m] = higher;
        UNROLL for (int f = 0; f < D / 8; f++) {
            sums[m][f].thread_elements()[0] *= shrink;
            sums[m][f].thread_elements()[1] *= shrink;
        }
    }
}
// end 2.6

// begin 2.6 weigh_block
// A block's weighted values join `sums` [8 * M, D]: of its S values, which lie [S, D] from `values` on, tokens
// [begin, end). What lies around these may be anything, and 0 * NaN is not 0.
template <int M, int S, int D, typename P>
inline void weigh_block(
    thread simdgroup_matrix<float, 8, 8> (&weights)[M][S / 8],
    const device P* values,
    int begin,
    int end,
    int2 place,
    thread simdgroup_matrix<float, 8, 8> (&sums)[M][D / 8]) {
    UNROLL for (int j = 0; j < S / 8; j++) {
        int token = j * 8 + place.x;
        bool counts = token >= begin && token < end;
        UNROLL for (int f = 0; f < D / 8; f++) {
            simdgroup_matrix<float, 8, 8> value;
            UNROLL for (int i = 0; i < 2; i++) {
                int at = token * D + f * 8 + place.y + i;
                value.thread_elements()[i] = counts ? static_cast<float>(values[at]) : 0.0f;
            }
            UNROLL for (int m = 0; m < M; m++) {
                simdgroup_multiply_accumulate(sums[m][f], weights[m][j], value, sums[m][f]);
            }
        }
    }
}
// end 2.6

// kernel paged_attention_tile(q, keys, values, key_scales, value_scales, tables, work, width, scale, window, written) -> (out, read)
    constexpr int ROWS = 8 * M;
    constexpr int SLICE = 64;  // columns of the result that the parts put together at a time
    constexpr int SLICES = (D + SLICE - 1) / SLICE;
    constexpr int THREADS = PARTS * 32;
    constexpr int HELD = (ROWS * SLICE + THREADS - 1) / THREADS;
    constexpr bool SCALED = sizeof(P) == 1;
    threadgroup float query[ROWS * D];
    threadgroup float largest[PARTS * ROWS];
    threadgroup float weight[PARTS * ROWS];
    threadgroup float kept[ROWS];
    threadgroup float added[ROWS];
    threadgroup float all[ROWS];
    threadgroup float partial[PARTS * ROWS * SLICE];
    int thread_index = int(thread_index_in_threadgroup);
    int lane = int(thread_index_in_simdgroup);
    int part = int(simdgroup_index_in_threadgroup);
    int2 place = lane_place(lane);
    int down = place.x, right = place.y;
    int head = int(thread_position_in_grid.y);
    ulong item = ulong(thread_position_in_grid.z) * 5;
    if (item == 0 && head == 0 && thread_index == 0) {
        read[0] = written;
    }
    ulong start = work[item];
    int pairs = work[item + 1] * G, pair = work[item + 4];
    ulong table = ulong(work[item + 2]) * width;
    int length = work[item + 3] + (min(pair + ROWS, pairs) - 1) / G;  // what the last row sees
    int low = max(0, work[item + 3] + pair / G - window);  // and where the first one's window begins

    for (int i = thread_index; i < ROWS * D; i += THREADS) {
        int mine = min(pair + i / D, pairs - 1);  // past the end: the last one, and not stored
        ulong at = ((start + mine / G) * K + head) * (G * D) + mine % G * D + i % D;
        query[i] = static_cast<float>(q[at]) * scale;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    int from[M], seen[M];
    UNROLL for (int m = 0; m < M; m++) {
        seen[m] = work[item + 3] + min(pair + m * 8 + down, pairs - 1) / G;
        from[m] = seen[m] - window;
    }
    float highest = -INFINITY, whole = 0.0f;  // of row thread_index, over the spans so far
    float result[SLICES][HELD];
    UNROLL for (int slice = 0; slice < SLICES; slice++) {
        UNROLL for (int n = 0; n < HELD; n++) {
            result[slice][n] = 0.0f;
        }
    }
    for (int begin = low / SPAN * SPAN; begin < length; begin += SPAN) {
        float top[M], total[M];
        simdgroup_matrix<float, 8, 8> sums[M][D / 8];
        UNROLL for (int m = 0; m < M; m++) {
            top[m] = -INFINITY;
            total[m] = 0.0f;
            UNROLL for (int f = 0; f < D / 8; f++) {
                sums[m][f] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
            }
        }
        int end = min(length, begin + SPAN);
        int unseen = max(0, low / S - begin / S - part + PARTS - 1) / PARTS * PARTS;  // blocks, of this part's steps
        for (int b = begin / S + part + unseen; b * S < end; b += PARTS) {
            ulong tokens = (ulong(tables[table + b]) * K + head) * S;
            ulong block = tokens * D;
            float key_units[S / 8][2], value_units[S / 8][2];
            UNROLL for (int j = 0; SCALED && j < S / 8; j++) {
                UNROLL for (int i = 0; i < 2; i++) {
                    int token = j * 8 + right + i;
                    bool counts = b * S + token >= low && b * S + token < length;
                    key_units[j][i] = counts ? static_cast<float>(key_scales[tokens + token]) : 0.0f;
                    value_units[j][i] = counts ? static_cast<float>(value_scales[tokens + token]) : 0.0f;
                }
            }
            simdgroup_matrix<float, 8, 8> scores[M][S / 8];
            score_block<M, S, D>(query, keys + block, place, scores);
            soften_block<M, S, D, SCALED>(b * S, from, seen, place, key_units, value_units, scores, top, total, sums);
            weigh_block<M, S, D>(scores, values + block, low - b * S, length - b * S, place, sums);
        }

        UNROLL for (int m = 0; m < M; m++) {
            if (right == 0) {
                largest[part * ROWS + m * 8 + down] = top[m];
                weight[part * ROWS + m * 8 + down] = total[m];
            }
        }
        UNROLL for (int slice = 0; slice < SLICES; slice++) {
            UNROLL for (int m = 0; m < M; m++) {
                UNROLL for (int f = 0; f < SLICE / 8; f++) {
                    int from = slice * (SLICE / 8) + f;
                    if (from < D / 8) {
                        int at = (part * ROWS + m * 8 + down) * SLICE + f * 8 + right;
                        partial[at] = sums[m][from].thread_elements()[0];
                        partial[at + 1] = sums[m][from].thread_elements()[1];
                    }
                }
            }
            threadgroup_barrier(mem_flags::mem_threadgroup);
            if (slice == 0) {
                if (thread_index < ROWS) {
                    float best = -INFINITY, sum = 0.0f;
                    for (int p = 0; p < PARTS; p++) {
                        best = max(best, largest[p * ROWS + thread_index]);
                    }
                    float base = best == -INFINITY ? 0.0f : best;
                    for (int p = 0; p < PARTS; p++) {
                        float share = metal::precise::exp(largest[p * ROWS + thread_index] - base);
                        sum += share * weight[p * ROWS + thread_index];
                        largest[p * ROWS + thread_index] = share;
                    }
                    float higher = max(highest, best);
                    float top_base = higher == -INFINITY ? 0.0f : higher;  // its window begins in a later span
                    kept[thread_index] = metal::precise::exp(highest - top_base);
                    added[thread_index] = metal::precise::exp(best - top_base);
                    whole = whole * kept[thread_index] + added[thread_index] * sum;
                    highest = higher;
                    all[thread_index] = whole;
                }
                threadgroup_barrier(mem_flags::mem_threadgroup);
            }
            UNROLL for (int n = 0; n < HELD; n++) {
                int i = thread_index + n * THREADS;
                int row = i / SLICE;
                if (i < ROWS * SLICE && slice * SLICE + i % SLICE < D) {
                    float sum = 0.0f;
                    for (int p = 0; p < PARTS; p++) {
                        sum += largest[p * ROWS + row] * partial[p * ROWS * SLICE + i];
                    }
                    result[slice][n] = result[slice][n] * kept[row] + added[row] * sum;
                }
            }
            threadgroup_barrier(mem_flags::mem_threadgroup);
        }
    }

    UNROLL for (int slice = 0; slice < SLICES; slice++) {
        UNROLL for (int n = 0; n < HELD; n++) {
            int i = thread_index + n * THREADS;
            int mine = pair + i / SLICE, d = slice * SLICE + i % SLICE;
            if (i < ROWS * SLICE && d < D && mine < pairs) {
                ulong at = ((start + mine / G) * K + head) * (G * D) + mine % G * D + d;
                out[at] = static_cast<T>(result[slice][n] / all[i / SLICE]);
            }
        }
    }
