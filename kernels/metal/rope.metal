// Rotary embedding of queries and keys in one dispatch, after Qwen3's norm of each head if there is one.
// A simdgroup a head of D elements: a lane holds the pairs (i, i + D / 2) with i = lane, lane + 32, ...

// begin 2.4 norm_head
// Norms a head: made in float, rounded to T, then multiplied by the weight and rounded again.
template <typename T, int D, int HELD, typename W>
inline void norm_head(
    thread float (&first)[HELD], thread float (&second)[HELD], W weight, float eps, uint lane) {
    float squares = 0.0f;
    UNROLL for (int n = 0; n < HELD; n++) {
        squares += first[n] * first[n] + second[n] * second[n];
    }
    float scale = metal::precise::rsqrt(simd_sum(squares) / D + eps);
    UNROLL for (int n = 0; n < HELD; n++) {
        int i = int(lane) + n * 32;
        if (i < D / 2) {
            first[n] = static_cast<float>(static_cast<T>(static_cast<T>(first[n] * scale) * weight[i]));
            second[n] = static_cast<float>(static_cast<T>(static_cast<T>(second[n] * scale) * weight[i + D / 2]));
        }
    }
}
// end 2.4

// Reads a head from x, norms it, turns it by `position`, writes it to out.
template <typename T, int D, bool NORM, typename X, typename W, typename F>
inline void norm_and_turn(
    X x, device T* out, W weight, F inv_freq, float position, float eps, uint lane) {
    constexpr int HALF = D / 2;
    constexpr int HELD = (HALF + 31) / 32;
    float first[HELD], second[HELD];
    UNROLL for (int n = 0; n < HELD; n++) {
        int i = int(lane) + n * 32;
        first[n] = i < HALF ? static_cast<float>(x[i]) : 0.0f;
        second[n] = i < HALF ? static_cast<float>(x[i + HALF]) : 0.0f;
    }
    if (NORM) {
        norm_head<T, D>(first, second, weight, eps, lane);
    }
    UNROLL for (int n = 0; n < HELD; n++) {
        int i = int(lane) + n * 32;
        if (i < HALF) {
            float angle = position * inv_freq[i];
            float c = metal::precise::cos(angle), s = metal::precise::sin(angle);
            out[i] = static_cast<T>(first[n] * c - second[n] * s);
            out[i + HALF] = static_cast<T>(second[n] * c + first[n] * s);
        }
    }
}

// kernel rope_qk(q, k, positions, inv_freq, q_norm, k_norm, eps) -> (q_out, k_out)
    uint lane = thread_index_in_simdgroup;
    uint head = thread_position_in_grid.y;
    ulong row = thread_position_in_grid.z;
    float position = static_cast<float>(positions[row]);
    if (head < HQ) {
        ulong at = (row * HQ + head) * D;
        norm_and_turn<T, D, NORM>(q + at, q_out + at, q_norm, inv_freq, position, eps, lane);
    } else {
        ulong at = (row * HK + head - HQ) * D;
        norm_and_turn<T, D, NORM>(k + at, k_out + at, k_norm, inv_freq, position, eps, lane);
    }
