// AMX's tile instructions on processors without them: a kernel compiled for AMX runs here as it is.
//
// Each such instruction is an illegal one there, and Linux sends a signal: its handler does what the instruction says,
// and holds it to the shapes that were set, as AMX would. Where there is AMX, nothing is sent, and nothing counted.
#pragma once

#include <stdint.h>

namespace tiny_llm::test {

// How many of each kind were met, on all threads.
struct TileCounts {
    int64_t configured, released, cleared, loaded, stored, multiplied;
};

// False where kernels for AMX are not built, or use what this processor lacks besides tiles.
bool can_emulate_tiles();

// Runs `body` with them, and says what was met.
TileCounts with_tiles_emulated(void (*body)());

}  // namespace tiny_llm::test
