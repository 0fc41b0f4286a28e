// Attention of each query row over the blocks of its own sequence, online softmax (Milakov & Gimelshein 2018).
// A threadgroup of PARTS simdgroups takes one row, one key/value head and one span of SPAN tokens: the head's G
// query heads share what is read. Simdgroup p sees the span's blocks p, p + PARTS, ...; the parts then become one in
// their order, and so do the spans in a second kernel where any row has several (SPLIT). Spans begin at multiples of
// SPAN whatever else is in the batch, so that a row's bits do not depend on the other rows.
// work: for each threadgroup its row, the row's sequence, the tokens that it sees, and its span.
// Of int8, a key's scale multiplies its score, and a value's goes into its weight; of floats there are no scales, and
// what comes in their place is not read.
// `written` and `read` say nothing: they put this behind the write that it sees, and the next write behind this.

// kernel paged_attention(q, keys, values, key_scales, value_scales, tables, work, width, scale, written) -> (out, read)
    constexpr int HELD = (D + 31) / 32;   // elements of a head that a lane holds
    constexpr int TOKENS = (S + 31) / 32;  // tokens of a block that a lane scores
    constexpr int STEP = D % 8 == 0 ? 8 : 1;  // elements of a key that are loaded together
    constexpr bool SCALED = sizeof(P) == 1;
    threadgroup float query[G * D];
    threadgroup float largest[PARTS * G];
    threadgroup float weight[PARTS * G];
    threadgroup float partial[PARTS * G * D];
    uint lane = thread_index_in_simdgroup;
    int part = int(simdgroup_index_in_threadgroup);
    int head = int(thread_position_in_grid.y);
    ulong item = thread_position_in_grid.z;
    ulong row = work[item * 4];
    if (item == 0 && head == 0 && thread_index_in_threadgroup == 0) {
        read[0] = written;
    }

    ulong first = (row * K + head) * (G * D);
    for (int i = int(thread_index_in_threadgroup); i < G * D; i += PARTS * 32) {
        query[i] = static_cast<float>(q[first + i]) * scale;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    float top[G], total[G], sums[G][HELD];
    UNROLL for (int g = 0; g < G; g++) {
        top[g] = -INFINITY;
        total[g] = 0.0f;
        UNROLL for (int n = 0; n < HELD; n++) {
            sums[g][n] = 0.0f;
        }
    }
    ulong table = ulong(work[item * 4 + 1]) * width;
    int begin = work[item * 4 + 3] * SPAN;
    int length = min(work[item * 4 + 2], begin + SPAN);
    for (int b = begin / S + part; b * S < length; b += PARTS) {
        ulong tokens = (ulong(tables[table + b]) * K + head) * S;
        ulong block = tokens * D;
        int count = min(S, length - b * S);
        float scores[TOKENS][G];
        float units[TOKENS];
        UNROLL for (int n = 0; n < TOKENS; n++) {
            int token = int(lane) + n * 32;
            bool counts = token < count;
            units[n] = SCALED && counts ? static_cast<float>(value_scales[tokens + token]) : 0.0f;
            UNROLL for (int g = 0; g < G; g++) {
                scores[n][g] = counts ? 0.0f : -INFINITY;
            }
            if (counts) {
                for (int first_d = 0; first_d < D; first_d += STEP) {
                    float key[STEP];
                    UNROLL for (int d = 0; d < STEP; d++) {
                        key[d] = static_cast<float>(keys[block + (first_d + d) * S + token]);
                    }
                    UNROLL for (int d = 0; d < STEP; d++) {
                        UNROLL for (int g = 0; g < G; g++) {
                            scores[n][g] = fma(query[g * D + first_d + d], key[d], scores[n][g]);
                        }
                    }
                }
                if (SCALED) {
                    float unit = static_cast<float>(key_scales[tokens + token]);
                    UNROLL for (int g = 0; g < G; g++) {
                        scores[n][g] *= unit;
                    }
                }
            }
        }
        UNROLL for (int g = 0; g < G; g++) {
            float best = scores[0][g];
            UNROLL for (int n = 1; n < TOKENS; n++) {
                best = max(best, scores[n][g]);
            }
            float higher = max(top[g], simd_max(best));
            float shrink = metal::precise::exp(top[g] - higher);
            float added = 0.0f;
            UNROLL for (int n = 0; n < TOKENS; n++) {
                float share = metal::precise::exp(scores[n][g] - higher);
                added += share;
                scores[n][g] = SCALED ? share * units[n] : share;
            }
            for (ushort apart = 1; apart < 32; apart *= 2) {  // simd_sum, in an order that is known
                added += simd_shuffle_xor(added, apart);
            }
            total[g] = total[g] * shrink + added;
            top[g] = higher;
            UNROLL for (int n = 0; n < HELD; n++) {
                sums[g][n] *= shrink;
            }
        }
        // The loop over a lane's tokens is of a known length: what it indexes stays in registers.
        UNROLL for (int n = 0; n < TOKENS; n++) {
            for (int from = 0; from < min(32, count - n * 32); from += 4) {
                float value[4][HELD];
                UNROLL for (int t = 0; t < 4; t++) {
                    int token = n * 32 + from + t;
                    UNROLL for (int i = 0; i < HELD; i++) {
                        int d = int(lane) + i * 32;
                        bool counts = d < D && token < count;
                        value[t][i] = counts ? static_cast<float>(values[block + token * D + d]) : 0.0f;
                    }
                }
                UNROLL for (int t = 0; t < 4; t++) {
                    UNROLL for (int g = 0; g < G; g++) {
                        float share = simd_shuffle(scores[n][g], ushort(from + t));  // 0 of a token past the end
                        UNROLL for (int i = 0; i < HELD; i++) {
                            sums[g][i] = fma(share, value[t][i], sums[g][i]);
                        }
                    }
                }
            }
        }
    }

    UNROLL for (int g = 0; g < G; g++) {
        if (lane == 0) {
            largest[part * G + g] = top[g];
            weight[part * G + g] = total[g];
        }
        UNROLL for (int n = 0; n < HELD; n++) {
            int d = int(lane) + n * 32;
            if (d < D) {
                partial[(part * G + g) * D + d] = sums[g][n];
            }
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = int(thread_index_in_threadgroup); i < G * D; i += PARTS * 32) {
        int g = i / D;
        float best = largest[g];
        for (int p = 1; p < PARTS; p++) {
            best = max(best, largest[p * G + g]);
        }
        float all = 0.0f, sum = 0.0f;
        for (int p = 0; p < PARTS; p++) {
            float share = metal::precise::exp(largest[p * G + g] - best);
            all += share * weight[p * G + g];
            sum += share * partial[p * G * D + i];
        }
        if (SPLIT) {
            ulong at = ((item * K + head) * G + g) * (D + 2);
            out[at + i % D] = static_cast<OUT>(sum);
            if (i % D == 0) {
                out[at + D] = static_cast<OUT>(best);
                out[at + D + 1] = static_cast<OUT>(all);
            }
        } else {
            out[first + i] = static_cast<OUT>(sum / all);
        }
    }

// kernel paged_attention_merge(parts, items) -> (out)
    uint lane = thread_index_in_simdgroup;
    ulong head = thread_position_in_grid.y;
    ulong row = thread_position_in_grid.z;
    int first = items[row], end = items[row + 1];
    for (int d = int(lane); d < D; d += 32) {
        float best = -INFINITY, all = 0.0f, sum = 0.0f;
        for (int i = first; i < end; i++) {
            ulong at = (ulong(i) * H + head) * (D + 2);
            float higher = max(best, parts[at + D]);
            float kept = metal::precise::exp(best - higher), added = metal::precise::exp(parts[at + D] - higher);
            all = all * kept + added * parts[at + D + 1];
            sum = sum * kept + added * parts[at + d];
            best = higher;
        }
        out[(row * H + head) * D + d] = static_cast<T>(sum / all);
    }
