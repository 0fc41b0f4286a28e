// Root mean square norm, and the same of a sum: a threadgroup of TG threads a row of E elements.
// A thread keeps its part of the row, so x is read once. The sum's order is fixed by E and TG.

// The sum of `part` over the threadgroup, the same in each thread.
template <int TG>
inline float sum_of_row(float part, threadgroup float* sums, uint lane, uint simdgroup) {
    part = simd_sum(part);
    if (TG > 32) {
        if (lane == 0) {
            sums[simdgroup] = part;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        part = simd_sum(lane < TG / 32 ? sums[lane] : 0.0f);
    }
    return part;
}

// kernel rms_norm(x, weight, eps) -> (out)
    constexpr int HELD = (E + TG - 1) / TG;
    threadgroup float sums[32];
    uint t = thread_position_in_threadgroup.x;
    ulong row = ulong(threadgroup_position_in_grid.x) * E;
    float held[HELD];
    float part = 0.0f;
    for (int i = 0; i < HELD; i++) {
        int e = int(t) + i * TG;
        held[i] = e < E ? static_cast<float>(x[row + e]) : 0.0f;
        part += held[i] * held[i];
    }
    float total = sum_of_row<TG>(part, sums, thread_index_in_simdgroup, simdgroup_index_in_threadgroup);
    float scale = metal::precise::rsqrt(total / E + eps);
    for (int i = 0; i < HELD; i++) {
        int e = int(t) + i * TG;
        if (e < E) {
            out[row + e] = static_cast<T>(static_cast<T>(held[i] * scale) * weight[e]);
        }
    }

// kernel add_rms_norm(x, residual, weight, eps) -> (total, out)
    constexpr int HELD = (E + TG - 1) / TG;
    threadgroup float sums[32];
    uint t = thread_position_in_threadgroup.x;
    ulong row = ulong(threadgroup_position_in_grid.x) * E;
    float held[HELD];
    float part = 0.0f;
    for (int i = 0; i < HELD; i++) {
        int e = int(t) + i * TG;
        held[i] = 0.0f;
        if (e < E) {
            T sum = static_cast<T>(x[row + e] + residual[row + e]);
            total[row + e] = sum;
            held[i] = static_cast<float>(sum);
        }
        part += held[i] * held[i];
    }
    float squares = sum_of_row<TG>(part, sums, thread_index_in_simdgroup, simdgroup_index_in_threadgroup);
    float scale = metal::precise::rsqrt(squares / E + eps);
    for (int i = 0; i < HELD; i++) {
        int e = int(t) + i * TG;
        if (e < E) {
            out[row + e] = static_cast<T>(static_cast<T>(held[i] * scale) * weight[e]);
        }
    }
