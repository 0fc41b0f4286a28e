// A draw from each row of logits: temperature, top-k, top-p, min-p, then the largest score + Gumbel noise. No sort.
// A threadgroup of TG threads a row. Tokens rank by one whole number, its key: its distance from the best above its
// id. Of the threads' own best tokens a late one is a bound: what is up to it, some thousand tokens, is
// held, and a cut is looked for among them; where it is not there, among all of the row. A cut is found by trying
// CUTS at a time: each thread counts its tokens up to each, or adds up their weights. Weights are whole numbers, of
// 2^-39, so that no order of threads changes a sum. Noise is mx.random's (Threefry-2x32, Salmon 2011).

constant constexpr int ID_BITS = 19;
constant constexpr int HELD = 2048;
constant constexpr int CUTS = 8;
constant constexpr ulong FARTHEST = 0x7f800001ul << ID_BITS;  // no key is larger

// Orders as the number does, NaN above all; the two zeros are one.
inline uint rank_of(float x) {
    if (x != x) {
        return 0xffffffffu;
    }
    uint bits = x == 0.0f ? 0u : as_type<uint>(x);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// Scores are at most 0: the further from it, the larger. From 1 on.
inline ulong key_of(float score, int id) {
    return (ulong(as_type<uint>(score) & 0x7fffffffu) << ID_BITS) + ulong(id) + 1;
}

inline float score_of(ulong key) {
    return -as_type<float>(uint((key - 1) >> ID_BITS));
}

inline ulong weight_of(float score) {
    return ulong(metal::precise::exp(score) * 549755813888.0f);
}

inline uint add(threadgroup uint* to, uint amount) {
    return atomic_fetch_add_explicit((threadgroup atomic_uint*)to, amount, memory_order_relaxed);
}

template <bool ALIGNED>
inline float4 four_from(const device float* row, int i, int vocab) {
    float4 four;
    if (ALIGNED) {
        four = *(const device float4*)(row + i);
    } else {
        UNROLL for (int j = 0; j < 4; j++) {
            four[j] = i + j < vocab ? row[i + j] : 0.0f;
        }
    }
    return four;
}

// The first of the largest of the threads' own (rank, id), the same in each thread.
template <int TG>
inline uint2 first_of_largest(uint rank, uint id, threadgroup uint* ranks, threadgroup uint* ids, uint t) {
    uint top = simd_max(rank);
    uint first = simd_min(rank == top ? id : 0xffffffffu);
    if (t % 32 == 0) {
        ranks[t / 32] = top;
        ids[t / 32] = first;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    uint2 best = uint2(ranks[0], ids[0]);
    for (int i = 1; i < TG / 32; i++) {
        if (ranks[i] > best.x || (ranks[i] == best.x && ids[i] < best.y)) {
            best = uint2(ranks[i], ids[i]);
        }
    }
    return best;
}

// Each of N numbers becomes the sum of all threads' own.
template <int TG, int N>
inline void sum_up(thread uint (&parts)[N], threadgroup uint* totals, threadgroup uint* sums, uint t) {
    UNROLL for (int n = 0; n < N; n++) {
        uint total = simd_sum(parts[n]);
        if (t % 32 == 0) {
            totals[n * (TG / 32) + t / 32] = total;
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (t < N) {
        uint sum = 0;
        for (int i = 0; i < TG / 32; i++) {
            sum += totals[t * (TG / 32) + i];
        }
        sums[t] = sum;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    UNROLL for (int n = 0; n < N; n++) {
        parts[n] = sums[n];
    }
}

// A mass by 20 bits, so that no sum of all threads' overflows.
inline uint piece_of(ulong mass, int piece) {
    return uint(mass >> (piece * 20)) & (piece == 2 ? 0xffffffffu : 0xfffffu);
}

inline ulong mass_of(uint low, uint middle, uint high) {
    return ulong(low) + (ulong(middle) << 20) + (ulong(high) << 40);
}

// Adds a token to what is up to each cut.
inline void tally(
    ulong key, ulong weight, thread ulong (&cuts)[CUTS], thread uint (&counts)[CUTS], thread ulong (&masses)[CUTS]) {
    UNROLL for (int c = 0; c < CUTS; c++) {
        counts[c] += key <= cuts[c] ? 1 : 0;
        masses[c] += key <= cuts[c] ? weight : 0;
    }
}

// Holds the keys above `from` up to `to`, and says how many there are, of which at most HELD are held; with
// `weighs`, what a thread's tokens weigh, all of them.
template <int TG, bool ALIGNED>
inline uint collect(
    const device float* row,
    int vocab,
    float largest,
    float temperature,
    ulong from,
    ulong to,
    bool weighs,
    thread ulong& mass,
    threadgroup ulong* held,
    threadgroup uint* found,
    uint t) {
    if (t == 0) {
        *found = 0;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    bool full = false;  // then a thread asks no more: the rest is for none
    for (int i = int(t) * 4; i < vocab; i += TG * 4) {
        float4 four = four_from<ALIGNED>(row, i, vocab);
        UNROLL for (int j = 0; j < 4; j++) {
            float score = (four[j] - largest) / temperature;
            ulong key = key_of(score, i + j);
            if (ALIGNED || i + j < vocab) {
                if (weighs) {
                    mass += weight_of(score);
                }
                if (key > from && key <= to && !full) {
                    uint place = add(found, 1);
                    full = place >= uint(HELD);
                    if (!full) {
                        held[place] = key;
                    }
                }
            }
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    return *found;
}

inline uint2 threefry(uint2 key, uint2 x) {
    uint third = key.x ^ key.y ^ 0x1BD11BDAu;
    uint keys[3] = {key.x, key.y, third};
    int turns[8] = {13, 15, 26, 6, 17, 29, 16, 24};
    x.x += keys[0];
    x.y += keys[1];
    UNROLL for (int i = 0; i < 5; i++) {
        UNROLL for (int j = 0; j < 4; j++) {
            int turn = turns[(i % 2) * 4 + j];
            x.x += x.y;
            x.y = ((x.y << turn) | (x.y >> (32 - turn))) ^ x.x;
        }
        x.x += keys[(i + 1) % 3];
        x.y += keys[(i + 2) % 3] + uint(i) + 1u;
    }
    return x;
}

// Number i of the n that mx.random.gumbel gives for the key: it fills its two halves by pairs.
inline float noise_of(uint2 key, uint i, uint n) {
    uint half_of = n / 2, apart = half_of + n % 2;
    bool first = i < half_of, middle = n % 2 == 1 && i == half_of;
    uint2 words = threefry(key, middle ? uint2(i, 0u) : first ? uint2(i, i + apart) : uint2(i - apart, i));
    uint word = first || middle ? words.x : words.y;
    float u = (static_cast<float>(word >> 16) * 65536.0f + static_cast<float>(word & 0xffffu)) * 2.3283064365386963e-10f;
    u = min(u, 0.99999994f);
    return max(-metal::precise::log(-metal::precise::log(u)), -4.0f);
}

// The better of what was drawn so far and a token; no noise is above 16.7, so few tokens need theirs.
inline void draw(
    float score, int id, uint2 noise_key, int vocab, thread float& largest, thread uint& drawn) {
    if (score + 16.7f >= largest) {
        float value = score + noise_of(noise_key, uint(id), uint(vocab));
        if (value > largest || (value == largest && uint(id) < drawn)) {
            largest = value;
            drawn = uint(id);
        }
    }
}

// kernel sample(logits, temperatures, top_k, top_p, floors, keys, vocab) -> (out)
    threadgroup ulong held[HELD];
    threadgroup uint totals[CUTS * 4 * (TG / 32)];
    threadgroup uint sums[CUTS * 4];
    threadgroup uint ranks[2 * (TG / 32)];
    threadgroup uint ids[2 * (TG / 32)];
    threadgroup uint found[1];
    uint t = thread_position_in_threadgroup.x;
    ulong row_index = threadgroup_position_in_grid.y;
    const device float* row = logits + row_index * vocab;

    uint rank = 0, id = 0xffffffffu;
    for (int i = int(t) * 4; i < vocab; i += TG * 4) {
        float4 four = four_from<ALIGNED>(row, i, vocab);
        UNROLL for (int j = 0; j < 4; j++) {
            uint its = rank_of(four[j]);
            if ((ALIGNED || i + j < vocab) && (its > rank || id == 0xffffffffu)) {
                rank = its;
                id = uint(i + j);
            }
        }
    }
    uint2 best = first_of_largest<TG>(rank, id, ranks, ids, t);
    float largest = row[best.y];
    // Where the largest is no finite number there is no distribution to draw from.
    bool draws = temperatures[row_index] > 0.0f && largest - largest == 0.0f;
    float temperature = max(temperatures[row_index], 1e-30f);
    uint most = top_k[row_index] < vocab ? uint(top_k[row_index]) : 0u;
    uint share = top_p[row_index];

    ulong last = FARTHEST;   // the key of the last token that is kept
    ulong bound = 0;         // all keys up to it are held
    uint holds = 0;          // keys
    ulong mass = 0;          // of a thread's tokens
    for (int phase = 0; phase < 3; phase++) {  // the bound, top-k, top-p
        bool by_mass = phase == 2;
        if (!draws || (by_mass ? share == 0 : phase == 1 ? most == 0 : most == 0 && share == 0)) {
            continue;  // the whole threadgroup does
        }
        ulong wanted = ulong(most), hi = last;
        uint hi_count = most != 0 && by_mass ? most : uint(vocab);
        bool from_held = false;
        if (phase == 0) {
            holds = min(uint(TG), uint(vocab + 3) / 4);
            if (t < holds) {
                held[t] = key_of((row[id] - largest) / temperature, int(id));
            }
            uint middle = uint(TG) * 7 / 8;  // some two tokens a thread are up to that one
            wanted = min(holds, most != 0 && most < middle ? most : middle);
            hi_count = holds;
            from_held = true;
        } else if (phase == 1) {
            from_held = holds >= most && bound != 0;
        } else {
            ulong here = 0;  // of what is held
            for (uint i = t; i < holds && bound != 0; i += TG) {
                here += held[i] <= last ? weight_of(score_of(held[i])) : 0;
            }
            if (most != 0 && last <= bound) {
                mass = here;
            } else if (most != 0) {
                mass = 0;
                for (int i = int(t) * 4; i < vocab; i += TG * 4) {
                    float4 four = four_from<ALIGNED>(row, i, vocab);
                    UNROLL for (int j = 0; j < 4; j++) {
                        float score = (four[j] - largest) / temperature;
                        bool kept = (ALIGNED || i + j < vocab) && key_of(score, i + j) <= last;
                        mass += kept ? weight_of(score) : 0;
                    }
                }
            }
            uint parts[6];
            UNROLL for (int p = 0; p < 3; p++) {
                parts[p] = piece_of(mass, p);
                parts[p + 3] = piece_of(here, p);
            }
            sum_up<TG, 6>(parts, totals, sums, t);
            ulong all = mass_of(parts[0], parts[1], parts[2]);
            ulong low = (all & 0xfffffffful) * share;
            wanted = (all >> 32) * share + (low >> 32) + ((low & 0xfffffffful) != 0 ? 1 : 0);
            from_held = bound != 0 && mass_of(parts[3], parts[4], parts[5]) >= wanted;
        }
        if (from_held && phase != 0 && bound < hi) {
            hi = bound;
            hi_count = holds;
        }

        // What is up to lo is less than is wanted, what is up to hi is not. What is held begins behind `before`.
        ulong lo = 0, lo_mass = 0, mass_before = 0;
        uint lo_count = 0, count_before = 0;
        while (hi_count - lo_count > 1) {
            ulong step = max((hi - lo) / (CUTS + 1), 1ul);
            ulong cuts[CUTS], masses[CUTS];
            uint counts[CUTS];
            UNROLL for (int c = 0; c < CUTS; c++) {
                // Where nothing is known: 0.5, 1.5, 3, 5, 7.5, 10.5, 14, 18 from the best.
                ulong guess = key_of(0.25f * static_cast<float>((c + 1) * (c + 2)), 0);
                cuts[c] = min(lo == 0 && hi == FARTHEST ? guess : lo + step * (c + 1), hi);
                masses[c] = 0;
                counts[c] = 0;
            }
            if (from_held) {
                for (uint i = t; i < holds; i += TG) {
                    tally(held[i], by_mass ? weight_of(score_of(held[i])) : 0, cuts, counts, masses);
                }
            } else {
                for (int i = int(t) * 4; i < vocab; i += TG * 4) {
                    float4 four = four_from<ALIGNED>(row, i, vocab);
                    UNROLL for (int j = 0; j < 4; j++) {
                        float score = (four[j] - largest) / temperature;
                        ulong key = key_of(score, i + j);
                        if ((ALIGNED || i + j < vocab) && key <= cuts[CUTS - 1]) {
                            tally(key, by_mass ? weight_of(score) : 0, cuts, counts, masses);
                        }
                    }
                }
            }
            uint parts[CUTS * 4];
            UNROLL for (int c = 0; c < CUTS; c++) {
                parts[c * 4] = counts[c];
                UNROLL for (int p = 0; p < 3; p++) {
                    parts[c * 4 + p + 1] = piece_of(masses[c], p);
                }
            }
            sum_up<TG, CUTS * 4>(parts, totals, sums, t);
            UNROLL for (int c = 0; c < CUTS; c++) {
                uint count = count_before + parts[c * 4];
                ulong weight = mass_before + mass_of(parts[c * 4 + 1], parts[c * 4 + 2], parts[c * 4 + 3]);
                if ((by_mass ? weight : ulong(count)) < wanted) {
                    lo = cuts[c];
                    lo_count = count;
                    lo_mass = weight;
                } else if (cuts[c] < hi) {
                    hi = cuts[c];
                    hi_count = count;
                }
            }
            if (!from_held && hi_count - lo_count <= uint(HELD)) {
                bool whole = hi_count <= uint(HELD);
                bound = whole ? hi : 0;
                count_before = whole ? 0 : lo_count;
                mass_before = whole ? 0 : lo_mass;
                ulong none = 0;
                holds = collect<TG, ALIGNED>(
                    row, vocab, largest, temperature, whole ? 0 : lo, hi, false, none, held, found, t);
                from_held = true;
            }
        }
        if (phase == 0) {
            bool weighs = share != 0 && most == 0;
            holds = collect<TG, ALIGNED>(row, vocab, largest, temperature, 0, hi, weighs, mass, held, found, t);
            bound = holds <= uint(HELD) ? hi : 0;
        } else {
            last = hi;
        }
    }

    uint drawn = 0xffffffffu;
    float most_so_far = -INFINITY;
    uint2 noise_key = uint2(keys[row_index * 2], keys[row_index * 2 + 1]);
    float floor_of_row = floors[row_index];
    if (draws && last <= bound) {
        for (uint i = t; i < holds; i += TG) {
            ulong key = held[i];
            float score = score_of(key);
            if (key <= last && score >= floor_of_row) {
                draw(score, int((key - 1) & ((1ul << ID_BITS) - 1)), noise_key, vocab, most_so_far, drawn);
            }
        }
    } else if (draws) {
        for (int i = int(t) * 4; i < vocab; i += TG * 4) {
            float4 four = four_from<ALIGNED>(row, i, vocab);
            UNROLL for (int j = 0; j < 4; j++) {
                float score = (four[j] - largest) / temperature;
                bool kept = (ALIGNED || i + j < vocab) && key_of(score, i + j) <= last;
                if (kept && score >= floor_of_row) {
                    draw(score, i + j, noise_key, vocab, most_so_far, drawn);
                }
            }
        }
    }
    uint drawn_rank = drawn == 0xffffffffu ? 0u : rank_of(most_so_far);
    uint2 winner = first_of_largest<TG>(drawn_rank, drawn, ranks + TG / 32, ids + TG / 32, t);
    if (t == 0) {
        out[row_index] = draws ? winner.y : best.y;
    }
