// silu(gate) * up, a thread an element.

// kernel swiglu(gate, up) -> (out)
    uint i = thread_position_in_grid.x;
    float x = static_cast<float>(gate[i]);
    T silu = static_cast<T>(x / (1.0f + metal::precise::exp(-x)));
    out[i] = static_cast<T>(silu * up[i]);
