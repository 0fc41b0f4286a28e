// New keys and values into the blocks of a layer's pool, where it lies. MLX knows the pool as an input that nobody
// changes, so it copies none of it and waits for none of it. What is in order is so by data: this waits for `after`,
// which the last to read the pool gave, and the next to read it waits for `written`.

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
