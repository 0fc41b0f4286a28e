// A draw from each row of logits: temperature, top-k, top-p, min-p, then the largest score + Gumbel noise. No sort.
// A threadgroup of TG threads a row. Tokens rank by one whole number, its distance from the best above its id: a cut
// is found ten bits at a time, by counting tokens, or adding up their weights, in 1024 bins. Weights are whole
// numbers too, of 2^-39, so that no order of threads changes a sum. Noise is mx.random's (Threefry-2x32, Salmon 2011).

constant constexpr int BINS = 1024;
constant constexpr int ID_BITS = 19;

// Orders as the number does, NaN above all; the two zeros are one.
inline uint rank_of(float x) {
    if (x != x) {
        return 0xffffffffu;
    }
    uint bits = x == 0.0f ? 0u : as_type<uint>(x);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// Scores are at most 0: the further from it, the larger.
inline ulong key_of(float score, int id) {
    return (ulong(as_type<uint>(score) & 0x7fffffffu) << ID_BITS) + ulong(id);
}

inline ulong weight_of(float score) {
    return ulong(metal::precise::exp(score) * 549755813888.0f);
}

inline void add(threadgroup uint* to, uint amount) {
    atomic_fetch_add_explicit((threadgroup atomic_uint*)to, amount, memory_order_relaxed);
}

// The first of the largest of the threads' own (rank, id), the same in each thread.
template <int TG>
inline uint2 first_of_largest(
    uint rank, uint id, threadgroup uint* ranks, threadgroup uint* ids, uint t) {
    ranks[t] = rank;
    ids[t] = id;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    uint2 best = uint2(ranks[0], ids[0]);
    for (int i = 1; i < TG; i++) {
        if (ranks[i] > best.x || (ranks[i] == best.x && ids[i] < best.y)) {
            best = uint2(ranks[i], ids[i]);
        }
    }
    return best;
}

inline uint2 threefry(uint2 key, uint2 x) {
    uint third = key.x ^ key.y ^ 0x1BD11BDAu;
    uint keys[3] = {key.x, key.y, third};
    int turns[8] = {13, 15, 26, 6, 17, 29, 16, 24};
    x.x += keys[0];
    x.y += keys[1];
    for (int i = 0; i < 5; i++) {
        for (int j = 0; j < 4; j++) {
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

// kernel sample(logits, temperatures, top_k, top_p, floors, keys, vocab) -> (out)
    threadgroup uint ranks[2 * TG];
    threadgroup uint ids[2 * TG];
    threadgroup uint bins[3 * BINS];
    threadgroup ulong sums[32];
    uint t = thread_position_in_threadgroup.x;
    ulong row = threadgroup_position_in_grid.y;
    ulong at = row * vocab;

    uint rank = 0, id = 0xffffffffu;
    for (int i = int(t); i < vocab; i += TG) {
        uint its = rank_of(logits[at + i]);
        if (its > rank || id == 0xffffffffu) {
            rank = its;
            id = uint(i);
        }
    }
    uint2 best = first_of_largest<TG>(rank, id, ranks, ids, t);
    float largest = logits[at + best.y];
    // Where the largest is no finite number there is no distribution to draw from.
    bool draws = temperatures[row] > 0.0f && largest - largest == 0.0f;
    float temperature = max(temperatures[row], 1e-30f);
    int most = top_k[row];
    uint share = top_p[row];

    ulong last = ~0ul;  // the key of the last token that is kept
    for (int phase = 0; phase < 2; phase++) {
        bool by_mass = phase == 1;
        if (!draws || (by_mass ? share == 0 : most == 0 || most >= vocab)) {
            continue;  // the whole threadgroup does
        }
        ulong wanted = ulong(most), before = 0, prefix = 0;
        for (int shift = 40; shift >= 0; shift -= 10) {
            for (int i = int(t); i < 3 * BINS; i += TG) {
                bins[i] = 0;
            }
            threadgroup_barrier(mem_flags::mem_threadgroup);
            for (int i = int(t); i < vocab; i += TG) {
                float score = (logits[at + i] - largest) / temperature;
                ulong key = key_of(score, i);
                if (key > last || key >> (shift + 10) != prefix) {
                    continue;
                }
                int bin = int((key >> shift) & 1023ul);
                ulong amount = by_mass ? weight_of(score) : 1ul;
                // 13 bits each, so that no sum of 2^19 overflows
                add(&bins[bin], uint(amount & 8191ul));
                if (by_mass) {
                    uint middle = uint((amount >> 13) & 8191ul), high = uint(amount >> 26);
                    add(&bins[BINS + bin], middle);
                    add(&bins[2 * BINS + bin], high);
                }
            }
            threadgroup_barrier(mem_flags::mem_threadgroup);
            if (t < 32) {
                ulong sum = 0;
                for (int i = 0; i < BINS / 32; i++) {
                    int bin = int(t) * (BINS / 32) + i;
                    sum += ulong(bins[bin]);
                    sum += ulong(bins[BINS + bin]) << 13;
                    sum += ulong(bins[2 * BINS + bin]) << 26;
                }
                sums[t] = sum;
            }
            threadgroup_barrier(mem_flags::mem_threadgroup);
            if (by_mass && shift == 40) {
                ulong all = 0;
                for (int i = 0; i < 32; i++) {
                    all += sums[i];
                }
                ulong low = (all & 0xfffffffful) * share;
                wanted = (all >> 32) * share + (low >> 32) + ((low & 0xfffffffful) != 0 ? 1 : 0);
            }
            int bin = 0;
            while (bin < 31 && before + sums[bin] < wanted) {
                before += sums[bin];
                bin++;
            }
            bin *= BINS / 32;
            for (int end = bin + BINS / 32 - 1; bin < end; bin++) {
                ulong amount = ulong(bins[bin]);
                amount += ulong(bins[BINS + bin]) << 13;
                amount += ulong(bins[2 * BINS + bin]) << 26;
                if (before + amount >= wanted) {
                    break;
                }
                before += amount;
            }
            prefix = (prefix << 10) + ulong(bin);
            threadgroup_barrier(mem_flags::mem_threadgroup);
        }
        last = min(last, prefix);
    }

    uint2 drawn = uint2(0u, 0xffffffffu);
    float most_so_far = -INFINITY;
    uint2 noise_key = uint2(keys[row * 2], keys[row * 2 + 1]);
    for (int i = int(t); i < vocab && draws; i += TG) {
        float score = (logits[at + i] - largest) / temperature;
        // No noise is above 16.7, so few tokens need theirs.
        if (key_of(score, i) > last || !(score >= floors[row]) || !(score + 16.7f > most_so_far)) {
            continue;
        }
        float value = score + noise_of(noise_key, uint(i), uint(vocab));
        if (value > most_so_far) {
            most_so_far = value;
            drawn = uint2(rank_of(value), uint(i));
        }
    }
    uint2 winner = first_of_largest<TG>(drawn.x, drawn.y, ranks + TG, ids + TG, t);
    if (t == 0) {
        out[row] = draws ? winner.y : best.y;
    }
