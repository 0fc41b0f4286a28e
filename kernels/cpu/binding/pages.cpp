// Pools of key and value blocks: their memory, and the copying of blocks inside and between them.
#include <nanobind/stl/vector.h>

#include <cstring>

#include "bindings.h"
#include "matrix.h"
#include "op.h"

namespace nb = nanobind;

namespace tiny_llm {
namespace {

// Memory that nobody has written to is not there yet: the array costs what is used of it.
mx::array untouched_zeros(const std::vector<int>& shape, mx::Dtype dtype) {
    int64_t bytes = dtype.size();
    for (const int length : shape) {
        if (length < 1) throw std::invalid_argument("[untouched_zeros] expected lengths of at least 1");
        bytes *= length;
    }
    return arena_array(mx::Shape(shape.begin(), shape.end()), dtype, bytes, allocate_pool);
}

// target[pairs[i, 1]] = source[pairs[i, 0]], in target's own memory. Pairs out of range are left out.
mx::array copy_blocks(const mx::array& source, const mx::array& target, const mx::array& pairs) {
    const char* op = "copy_blocks";
    const auto block = [](const mx::array& pool) { return mx::Shape(pool.shape().begin() + 1, pool.shape().end()); };
    expect(source.ndim() > 1 && source.shape(0) > 0, op, "a pool of at least one block", source);
    expect(target.ndim() > 1 && target.dtype() == source.dtype() && block(target) == block(source), op,
           "a pool with the source's dtype and block", target);
    expect(pairs.ndim() == 2 && pairs.shape(1) == 2 && pairs.dtype() == mx::int32, op, "pairs int32 [n, 2]", pairs);
    const int64_t from_blocks = source.shape(0), to_blocks = target.shape(0), count = pairs.shape(0);
    const int64_t bytes = source.nbytes() / from_blocks;
    return call(op, {source, target, pairs}, {{target.shape(), target.dtype(), 1}}, [=](auto& in, auto& out) {
        const auto* from = get<char>(in[0]);
        const auto* pair = get<int32_t>(in[2]);
        auto* to = get<char>(out[0]);
        for (int64_t i = 0; i < count; ++i) {
            const int64_t a = pair[2 * i], b = pair[2 * i + 1];
            if (a >= 0 && a < from_blocks && b >= 0 && b < to_blocks) std::memcpy(to + b * bytes, from + a * bytes, bytes);
        }
    })[0];
}

}  // namespace

void bind_pages(nb::module_& m) {
    m.def("untouched_zeros", &untouched_zeros, nb::arg("shape"), nb::arg("dtype"));
    m.def("copy_blocks", &copy_blocks, nb::arg("source"), nb::arg("target"), nb::arg("pairs"));
}

}  // namespace tiny_llm
