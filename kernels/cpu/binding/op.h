// One kernel call as a lazy MLX operation. Owns the way from mx.array to plain pointers and back.
//
// A binding checks shapes and dtypes, and gives `call` its inputs, what comes out, and the function to
// run on the stream's thread. Inputs that are not contiguous are copied there first.
#pragma once

#include <functional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "mlx/mlx.h"

namespace tiny_llm {

namespace mx = mlx::core;

struct Spec {
    mx::Shape shape;
    mx::Dtype dtype;
    int in_place = -1;  // this output is input number in_place, changed where it lies
};

// Pointers to the inputs' and outputs' first elements, in order.
using Run = std::function<void(const std::vector<const void*>& in, const std::vector<void*>& out)>;

// A kernel's part in a graph.
struct Call {
    std::vector<Spec> outputs;
    Run run;
};

std::vector<mx::array> call(const char* name, std::vector<mx::array> inputs, std::vector<Spec> outputs, Run run);

// What computes an array that `call` gave; null for any other.
const Call* call_of(const mx::array& a);

// Seconds that this process has spent in kernels.
double kernel_seconds();

template <class T>
const T* get(const void* p) { return static_cast<const T*>(p); }
template <class T>
T* get(void* p) { return static_cast<T*>(p); }

std::string describe(const mx::array& a);
[[noreturn]] void refuse(const char* op, const std::string& expected, const mx::array& got);

// Throw std::invalid_argument "[op] expected ..., got ..." unless ok. `expected` is text, or makes it when asked: a
// step of a model comes here a thousand times.
template <class Expected>
void expect(bool ok, const char* op, const Expected& expected, const mx::array& got) {
    if (ok) return;
    if constexpr (std::is_invocable_v<Expected>) {
        refuse(op, expected(), got);
    } else {
        refuse(op, expected, got);
    }
}

}  // namespace tiny_llm
