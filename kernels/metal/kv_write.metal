// New keys and values into the blocks of a layer's pool, where it lies. MLX knows the pool as an input that nobody
// changes, so it copies none of it and waits for none of it. What is in order is so by data: this waits for `after`,
// which the last to read the pool gave, and the next to read it waits for `written`.

// A lane's part of a vector as int8, one of D elements in each `step` from `to` on; what 1 is worth, at `unit`.
// Absolute values are compared as integers, whose order is theirs, and NaN is above all: it stays in the scale.
template <int D, typename X>
inline void quantize(X x, device int8_t* to, int step, device half* unit, int lane) {
    uint largest = 0;
    for (int d = lane; d < D; d += 32) {
        largest = max(largest, as_type<uint>(static_cast<float>(x[d])) & 0x7fffffffu);
    }
    half kept = static_cast<half>(as_type<float>(simd_max(largest)) / 127.0f);
    float scale = static_cast<float>(kept);
    for (int d = lane; d < D; d += 32) {
        float steps = scale > 0.0f ? rint(static_cast<float>(x[d]) / scale) : 0.0f;
        to[d * step] = static_cast<int8_t>(min(max(steps, -127.0f), 127.0f));
    }
    if (lane == 0) {
        *unit = kept;
    }
}

// kernel kv_write(mutable keys, mutable values, k, v, slots, after) -> (written)
    int d = int(thread_position_in_grid.x);
    int head = int(thread_position_in_grid.y);
    ulong row = thread_position_in_grid.z;
    ulong slot = slots[row];
    ulong block = (slot / S * K + head) * (D * S);
    int place = int(slot % S);
    ulong from = (row * K + head) * D + d;
    device P* to_keys = const_cast<device P*>(keys);
    device P* to_values = const_cast<device P*>(values);
    to_keys[block + d * S + place] = static_cast<P>(static_cast<float>(k[from]));
    to_values[block + place * D + d] = static_cast<P>(static_cast<float>(v[from]));
    if (row == 0 && head == 0 && d == 0) {
        written[0] = after;
    }

// kernel kv_write_int8(mutable keys, mutable values, mutable key_scales, mutable value_scales, k, v, slots, after) -> (written)
    int lane = int(thread_index_in_simdgroup);
    int head = int(thread_position_in_grid.y);
    ulong row = thread_position_in_grid.z;
    ulong slot = slots[row];
    ulong tokens = (slot / S * K + head) * S;
    int place = int(slot % S);
    ulong from = (row * K + head) * D;
    device int8_t* to_keys = const_cast<device int8_t*>(keys) + tokens * D + place;
    device int8_t* to_values = const_cast<device int8_t*>(values) + (tokens + place) * D;
    quantize<D>(k + from, to_keys, S, const_cast<device half*>(key_scales) + tokens + place, lane);
    quantize<D>(v + from, to_values, 1, const_cast<device half*>(value_scales) + tokens + place, lane);
    if (row == 0 && head == 0 && lane == 0) {
        written[0] = after;
    }
