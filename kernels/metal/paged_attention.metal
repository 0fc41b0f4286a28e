// Attention of each query row over the blocks of its own sequence, online softmax (Milakov & Gimelshein 2018).
// A piece of work is one key/value head and one span of SPAN tokens, for one row, or for several whose blocks there
// are the same. The head's G query heads share what is read, and so do R rows of a simdgroup and SIDES of these side
// by side; a piece of more rows takes turns. Of a side's PARTS simdgroups, p sees the span's blocks p, p + PARTS, ...;
// the parts then become one in their order, and so do the spans in a second kernel where any row has several
// (SPLIT). Spans begin at multiples of SPAN whatever else is in the batch, so that a row's bits do not depend on the
// other rows.
// work: for each piece its first place in `rows`, how many it has, a sequence, the tokens that are seen, and its
// span. What a row gets is at its place in `rows`, which is the row itself where it has but one.
// A row sees its last `window` tokens: blocks before these are not read. Pieces of several rows lie inside all windows.
// Of int8, a key's scale multiplies its score, and a value's goes into its weight; of floats there are no scales, and
// what comes in their place is not read.
// `written` and `read` say nothing: they put this behind the write that it sees, and the next write behind this.

// begin 3.2 first_block
// The first block that simdgroup `part` of PARTS reads, of a span that begins at token `begin`: its turns are the span's
// blocks part, part + PARTS, ..., and those of them that lie whole before token `low` are skipped.
template <int S, int PARTS>
inline int first_block(int begin, int low, int part) {
    int unseen = max(0, low / S - begin / S - part + PARTS - 1) / PARTS * PARTS;
    return begin / S + part + unseen;
}
// end 3.2

// begin 3.2 score_tokens
// The scores of Q queries, of `query` [Q, D], with this lane's tokens of a block, lane + 32 n: its keys lie [D, S] from
// `keys` on. Tokens outside of [from, end) are not read, and have -INFINITY. Of int8, a score is times its key's unit.
template <int Q, int S, int D, bool SCALED, typename P, typename U>
inline void score_tokens(
    const threadgroup float* query,
    const device P* keys,
    U units,
    int from,
    int end,
    int lane,
    thread float (&scores)[(S + 31) / 32][Q]) {
    constexpr int STEP = D % 8 == 0 ? 8 : 1;  // elements of a key that are loaded together
    UNROLL for (int n = 0; n < (S + 31) / 32; n++) {
        int token = lane + n * 32;
        bool counts = token >= from && token < end;
        UNROLL for (int g = 0; g < Q; g++) {
            scores[n][g] = counts ? 0.0f : -INFINITY;
        }
        if (counts) {
            for (int first = 0; first < D; first += STEP) {
                float key[STEP];
                UNROLL for (int d = 0; d < STEP; d++) {
                    key[d] = static_cast<float>(keys[(first + d) * S + token]);
                }
                UNROLL for (int d = 0; d < STEP; d++) {
                    UNROLL for (int g = 0; g < Q; g++) {
                        scores[n][g] = fma(query[g * D + first + d], key[d], scores[n][g]);
                    }
                }
            }
            if (SCALED) {
                float unit = static_cast<float>(units[token]);
                UNROLL for (int g = 0; g < Q; g++) {
                    scores[n][g] *= unit;
                }
            }
        }
    }
}
// end 3.2

// begin 3.2 merge_spans
// Number d of a row's result for one head: the parts at places order[first] to order[end - 1] become one, one after the
// other. A part is D sums of values, their largest score and their sum of weights; `shared` has those of the places below
// `places`, `own` the others. Both lie [places, H, D + 2].
template <int H, int D>
inline float merge_spans(
    const device float* shared,
    const device float* own,
    int places,
    const device int* order,
    int first,
    int end,
    ulong head,
    int d) {
    float best = -INFINITY, all = 0.0f, sum = 0.0f;
    for (int i = first; i < end; i++) {
        int place = order[i];
        const device float* part = place < places ? shared : own;
        part += (ulong(place < places ? place : place - places) * H + head) * (D + 2);
        float higher = max(best, part[D]);
        float kept = metal::precise::exp(best - higher), added = metal::precise::exp(part[D] - higher);
        all = all * kept + added * part[D + 1];
        sum = sum * kept + added * part[d];
        best = higher;
    }
    return sum / all;
}
// end 3.2

// kernel paged_attention(q, keys, values, key_scales, value_scales, tables, rows, work, width, scale, window, written) -> (out, read)
    constexpr int Q = R * G;  // queries of a simdgroup
    constexpr int THREADS = SIDES * PARTS * 32;
    constexpr int HELD = (D + 31) / 32;   // elements of a head that a lane holds
    constexpr int TOKENS = (S + 31) / 32;  // tokens of a block that a lane scores
    constexpr bool SCALED = sizeof(P) == 1;
    threadgroup float vectors[SIDES * Q * D];  // queries; then what the parts add up
    threadgroup float largest[PARTS * SIDES * Q];
    threadgroup float weight[PARTS * SIDES * Q];
    uint lane = thread_index_in_simdgroup;
    int part = int(simdgroup_index_in_threadgroup) % PARTS;
    int own = int(simdgroup_index_in_threadgroup) / PARTS * Q;  // the first of this simdgroup's queries
    int head = int(thread_position_in_grid.y);
    ulong item = ulong(thread_position_in_grid.z) * 5;
    if (item == 0 && head == 0 && thread_index_in_threadgroup == 0) {
        read[0] = written;
    }
    int first = work[item], members = work[item + 1];
    ulong table = ulong(work[item + 2]) * width;
    int begin = work[item + 4] * SPAN;
    int length = min(work[item + 3], begin + SPAN);
    int low = max(begin, work[item + 3] - window);

    for (int turn = 0; turn < members; turn += SIDES * R) {
        for (int i = int(thread_index_in_threadgroup); i < SIDES * Q * D; i += THREADS) {
            ulong row = rows[first + min(turn + i / (G * D), members - 1)];  // past the end: the last one, not stored
            vectors[i] = static_cast<float>(q[(row * K + head) * (G * D) + i % (G * D)]) * scale;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);

        float top[Q], total[Q], sums[Q][HELD];
        UNROLL for (int g = 0; g < Q; g++) {
            top[g] = -INFINITY;
            total[g] = 0.0f;
            UNROLL for (int n = 0; n < HELD; n++) {
                sums[g][n] = 0.0f;
            }
        }
        int end = turn + own / G < members ? length : 0;  // nobody is left for this side
        for (int b = first_block<S, PARTS>(begin, low, part); b * S < end; b += PARTS) {
            ulong tokens = (ulong(tables[table + b]) * K + head) * S;
            ulong block = tokens * D;
            int count = min(S, length - b * S), before = low - b * S;
            float scores[TOKENS][Q];
            float units[TOKENS];
            UNROLL for (int n = 0; n < TOKENS; n++) {
                int token = int(lane) + n * 32;
                bool counts = token >= before && token < count;
                units[n] = SCALED && counts ? static_cast<float>(value_scales[tokens + token]) : 0.0f;
            }
            score_tokens<Q, S, D, SCALED>(
                vectors + own * D, keys + block, key_scales + tokens, before, count, int(lane), scores);
            UNROLL for (int g = 0; g < Q; g++) {
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
                            bool counts = d < D && token >= before && token < count;
                            value[t][i] = counts ? static_cast<float>(values[block + token * D + d]) : 0.0f;
                        }
                    }
                    UNROLL for (int t = 0; t < 4; t++) {
                        UNROLL for (int g = 0; g < Q; g++) {
                            float share = simd_shuffle(scores[n][g], ushort(from + t));  // 0 of a token past the end
                            UNROLL for (int i = 0; i < HELD; i++) {
                                sums[g][i] = fma(share, value[t][i], sums[g][i]);
                            }
                        }
                    }
                }
            }
        }
        UNROLL for (int g = 0; g < Q; g++) {
            if (lane == 0) {
                largest[part * SIDES * Q + own + g] = top[g];
                weight[part * SIDES * Q + own + g] = total[g];
            }
        }
        for (int p = 0; p < PARTS; p++) {  // one after the other, as their order is that of the sum
            threadgroup_barrier(mem_flags::mem_threadgroup);
            if (p == part) {
                UNROLL for (int g = 0; g < Q; g++) {
                    float best = largest[own + g];
                    for (int other = 1; other < PARTS; other++) {
                        best = max(best, largest[other * SIDES * Q + own + g]);
                    }
                    float share = metal::precise::exp(top[g] - best);
                    UNROLL for (int n = 0; n < HELD; n++) {
                        int d = int(lane) + n * 32;
                        if (d < D) {
                            int at = (own + g) * D + d;
                            vectors[at] = (p == 0 ? 0.0f : vectors[at]) + share * sums[g][n];
                        }
                    }
                }
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        int taken = min(SIDES * R, members - turn) * (G * D);
        for (int i = int(thread_index_in_threadgroup); i < taken; i += THREADS) {
            int at = i / D;
            float best = largest[at];
            for (int p = 1; p < PARTS; p++) {
                best = max(best, largest[p * SIDES * Q + at]);
            }
            float all = 0.0f;
            for (int p = 0; p < PARTS; p++) {
                all += metal::precise::exp(largest[p * SIDES * Q + at] - best) * weight[p * SIDES * Q + at];
            }
            ulong query = (ulong(first + turn + at / G) * K + head) * G + at % G;
            if (SPLIT) {
                out[query * (D + 2) + i % D] = static_cast<OUT>(vectors[i]);
                if (i % D == 0) {
                    out[query * (D + 2) + D] = static_cast<OUT>(best);
                    out[query * (D + 2) + D + 1] = static_cast<OUT>(all);
                }
            } else {
                out[query * D + i % D] = static_cast<OUT>(vectors[i] / all);
            }
        }  // the next turn's queries take the place of what the same threads read here
    }

// parts of places in `rows` that rows share, of which there are `places`, and of their own; `order`: of each row the
// places, those of its own numbered behind, in the order of its spans; `firsts`: where in `order` a row begins.

// kernel paged_attention_merge(shared, own, places, order, firsts, written) -> (out, read)
    uint lane = thread_index_in_simdgroup;
    ulong head = thread_position_in_grid.y;
    ulong row = thread_position_in_grid.z;
    if (row == 0 && head == 0 && lane == 0) {
        read[0] = written;
    }
    int first = firsts[row], end = firsts[row + 1];
    for (int d = int(lane); d < D; d += 32) {
        float merged = merge_spans<H, D>(shared, own, places, order, first, end, head, d);
        out[(row * H + head) * D + d] = static_cast<T>(merged);
    }
