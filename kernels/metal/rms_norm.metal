// Root mean square norm, and the same of a sum: a threadgroup of TG threads takes R rows of E elements in turn.
// A thread keeps its part of a row, so x is read once, and of the weight, which is read once for R rows.
// The sum's order is fixed by E and TG.

// The sum of `part` over the threadgroup, the same in each thread. Turns alternate between two halves of `sums`:
// one barrier a turn is enough.
template <int TG>
inline float sum_of_row(float part, threadgroup float* sums, int turn, uint lane, uint simdgroup) {
    part = simd_sum(part);
    if (TG > 32) {
        int half_of = turn % 2 * 32;
        if (lane == 0) {
            sums[half_of + simdgroup] = part;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        part = simd_sum(lane < TG / 32 ? sums[half_of + lane] : 0.0f);
    }
    return part;
}

// kernel rms_norm(x, weight, eps, rows) -> (out)
    constexpr int HELD = (E + TG - 1) / TG;
    threadgroup float sums[64];
    uint t = thread_position_in_threadgroup.x;
    int first = int(threadgroup_position_in_grid.x) * R;
    T scales[HELD];
    UNROLL for (int i = 0; i < HELD; i++) {
        int e = int(t) + i * TG;
        scales[i] = e < E ? weight[e] : static_cast<T>(0.0f);
    }
    for (int r = 0; r < R && first + r < rows; r++) {
        ulong row = ulong(first + r) * E;
        float held[HELD];
        float part = 0.0f;
        UNROLL for (int i = 0; i < HELD; i++) {
            int e = int(t) + i * TG;
            held[i] = e < E ? static_cast<float>(x[row + e]) : 0.0f;
            part += held[i] * held[i];
        }
        float total = sum_of_row<TG>(part, sums, r, thread_index_in_simdgroup, simdgroup_index_in_threadgroup);
        float scale = metal::precise::rsqrt(total / E + eps);
        UNROLL for (int i = 0; i < HELD; i++) {
            int e = int(t) + i * TG;
            if (e < E) {
                out[row + e] = static_cast<T>(static_cast<T>(held[i] * scale) * scales[i]);
            }
        }
    }

// kernel add_rms_norm(x, residual, weight, eps, rows) -> (total, out)
    constexpr int HELD = (E + TG - 1) / TG;
    threadgroup float sums[64];
    uint t = thread_position_in_threadgroup.x;
    int first = int(threadgroup_position_in_grid.x) * R;
    T scales[HELD];
    UNROLL for (int i = 0; i < HELD; i++) {
        int e = int(t) + i * TG;
        scales[i] = e < E ? weight[e] : static_cast<T>(0.0f);
    }
    for (int r = 0; r < R && first + r < rows; r++) {
        ulong row = ulong(first + r) * E;
        float held[HELD];
        float part = 0.0f;
        UNROLL for (int i = 0; i < HELD; i++) {
            int e = int(t) + i * TG;
            held[i] = 0.0f;
            if (e < E) {
                T sum = static_cast<T>(x[row + e] + residual[row + e]);
                total[row + e] = sum;
                held[i] = static_cast<float>(sum);
            }
            part += held[i] * held[i];
        }
        float squares = sum_of_row<TG>(part, sums, r, thread_index_in_simdgroup, simdgroup_index_in_threadgroup);
        float scale = metal::precise::rsqrt(squares / E + eps);
        UNROLL for (int i = 0; i < HELD; i++) {
            int e = int(t) + i * TG;
            if (e < E) {
                out[row + e] = static_cast<T>(static_cast<T>(held[i] * scale) * scales[i]);
            }
        }
    }
