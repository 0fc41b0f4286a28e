// How many cores there are to use. Owns what the system says about them.
#pragma once

namespace tiny_llm {

// Physical cores that this process may use, after affinity and container limits; at least 1.
int physical_cores();

}  // namespace tiny_llm
