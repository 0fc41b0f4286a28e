#include "matrix.h"

#include <nanobind/stl/pair.h>

#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

#include "bindings.h"
#include "op.h"

namespace nb = nanobind;

namespace tiny_llm {
namespace {

// MLX's CPU buffers have a header before the data that raw_ptr() skips; how long it is, it tells itself.
ptrdiff_t header_bytes() {
    static char anywhere[256];
    return static_cast<char*>(mx::allocator::Buffer(anywhere).raw_ptr()) - anywhere;
}

}  // namespace

mx::array arena_array(mx::Shape shape, mx::Dtype dtype, int64_t bytes, Block (*allocate)(size_t)) {
    constexpr ptrdiff_t kRoom = 64;  // for the header, so that MLX may read it too
    Block block = allocate(bytes + kRoom);
    char* data = static_cast<char*>(block.data) + kRoom;
    const size_t size = bytes;
    if (header_bytes() == sizeof size) std::memcpy(data - sizeof size, &size, sizeof size);
    auto release = [release = std::move(block.release)](mx::allocator::Buffer) { release(); };
    mx::allocator::Data owned(mx::allocator::Buffer(data - header_bytes()), std::move(release));
    return mx::array(std::move(owned), std::move(shape), dtype);
}

PackedMatrix make_matrix(Matrix layout, int64_t bytes_of_tile) {
    // Two axes, because one of more than 2^31 bytes has no room in a shape.
    const int64_t all = layout.count * tiles(layout);
    const mx::Shape shape{static_cast<int>(all), static_cast<int>(bytes_of_tile)};
    mx::array data = arena_array(shape, mx::uint8, all * bytes_of_tile, allocate_weights);
    layout.data = data.data<char>();
    return {std::move(data), layout};
}

Kind kind_of(const char* op, const mx::array& a) {
    if (a.dtype() == mx::float32) return Kind::f32;
    if (a.dtype() == mx::bfloat16) return Kind::bf16;
    if (a.dtype() == mx::float16) return Kind::f16;
    throw std::invalid_argument("[" + std::string(op) + "] expected float32, bfloat16 or float16, got " + describe(a));
}

void bind_matrix(nb::module_& m) {
    const auto self = nb::rv_policy::copy;
    nb::class_<PackedMatrix>(m, "Matrix", "A weight [O, I] in the kernels' layout, or `count` of them.")
        .def_prop_ro("data", [](const PackedMatrix& p) { return p.data; }, self, "Its bytes, uint8.")
        .def_prop_ro("rows", [](const PackedMatrix& p) { return p.layout.rows; })
        .def_prop_ro("columns", [](const PackedMatrix& p) { return p.layout.columns; })
        .def_prop_ro("count", [](const PackedMatrix& p) { return p.layout.count; })
        .def_prop_ro("shape", [](const PackedMatrix& p) { return std::pair(p.layout.rows, p.layout.columns); })
        .def_prop_ro("bits", [](const PackedMatrix& p) { return bits_of(p.layout.kind); }, "Of a stored weight.")
        .def_prop_ro("group_size", [](const PackedMatrix& p) { return p.layout.group_size; }, "0 if dense.")
        .def_prop_ro("exact", [](const PackedMatrix& p) { return p.layout.exact; })
        .def_prop_ro("nbytes", [](const PackedMatrix& p) { return p.data.nbytes(); });
}

}  // namespace tiny_llm
