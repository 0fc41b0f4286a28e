// Rows of a quantized table [V, E] of 4 or 8 bits in groups: a thread a word of a row, 32 / BITS numbers.

// kernel embedding(tokens, packed, scales, biases, words) -> (out)
    constexpr int WEIGHTS = 32 / BITS;
    int word = int(thread_position_in_grid.x);
    ulong row = thread_position_in_grid.y;
    ulong at = ulong(tokens[row]) * words + word;
    ulong group = at * WEIGHTS / GROUP;
    uint bits = packed[at];
    float scale = static_cast<float>(scales[group]), bias = static_cast<float>(biases[group]);
    UNROLL for (int w = 0; w < WEIGHTS; w++) {
        uint number = (bits >> (w * BITS)) & ((1u << BITS) - 1);
        out[(row * words + word) * WEIGHTS + w] = static_cast<T>(fma(scale, static_cast<float>(number), bias));
    }
