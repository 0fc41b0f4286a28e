// The Python module tiny_llm._cpu: settings of the kernels, and each op's binding.
#include <nanobind/nanobind.h>
#if defined(__linux__)
#include <malloc.h>
#endif
#include <nanobind/stl/string.h>

#include <stdexcept>
#include <string>

#include "../isa.h"
#include "../pool.h"
#include "bindings.h"
#include "op.h"
#include "mlx/array.h"
#include "mlx/version.h"

namespace nb = nanobind;

namespace tiny_llm {
namespace {

// Another MLX would lay its arrays out in another way: better no kernels than a crash in one.
void check_mlx() {
    const std::string built = std::to_string(MLX_VERSION_MAJOR) + "." + std::to_string(MLX_VERSION_MINOR) + "." +
                              std::to_string(MLX_VERSION_PATCH);
    const std::string found = mlx::core::version();
    if (found != built && found.rfind(built + ".", 0) != 0)
        throw nb::import_error(("the CPU kernels were built for MLX " + built + ", but this is MLX " + found).c_str());
}

// MLX takes each activation from malloc, which would map, clear and unmap the large ones on every op: let it keep
// what it has got, up to 32 MB a piece and 256 MB in all. 512 tokens of prefill: 1.2 times as fast. Not while
// weights are loaded, where it would add to the peak.
void keep_memory() {
#if defined(__GLIBC__)
    mallopt(M_MMAP_THRESHOLD, 32 << 20);
    mallopt(M_TRIM_THRESHOLD, 256 << 20);
    mallopt(M_TOP_PAD, 16 << 20);
#endif
}

}  // namespace

NB_MODULE(_cpu, m) {
    check_mlx();
    m.doc() = "CPU kernels as lazy MLX operations.";
    m.def("isa", [] { return std::string(isa_name(isa())); }, "The instruction set in use.");
    m.def("best_isa", [] { return std::string(isa_name(best_isa())); }, "The best one that this machine has.");
    m.def("set_isa", [](const std::string& name) {
        if (!set_isa(name.c_str()))
            throw std::invalid_argument("isa is '" + name + "', expected " + isa_names() + ", at most " +
                                        isa_name(best_isa()) + " on this machine");
    }, nb::arg("name"), "Use another instruction set; only while no kernel runs.");
    m.def("all_float32", [](const nb::args& arrays) {
        for (nb::handle array : arrays)
            if (nb::cast<const mlx::core::array&>(array).dtype() != mlx::core::float32) return false;
        return true;
    }, "Whether the kernels can take all of these arrays.");
    m.def("keep_memory", &keep_memory, "Keep freed memory for what is next: once the weights are loaded.");
    m.def("kernel_seconds", &kernel_seconds, "Seconds that this process has spent in kernels.");
    m.def("num_threads", &num_threads, "Threads that a kernel uses.");
    m.def("set_num_threads", [](int threads) {
        if (threads < 1 || threads > kMostThreads)
            throw std::invalid_argument("threads is " + std::to_string(threads) + ", expected 1 to " +
                                        std::to_string(kMostThreads));
        const nb::gil_scoped_release release;
        set_num_threads(threads);
    }, nb::arg("threads"), "Change their number.");
    bind_matrix(m);
    bind_linear(m);  // first: other signatures name its class
    bind_argmax(m);
    bind_chain(m);
    bind_embedding(m);
    bind_experts(m);
    bind_attention(m);
    bind_pages(m);
    bind_logprobs(m);
    bind_quantized_rows(m);
    bind_rms_norm(m);
    bind_rope(m);
    bind_sampling(m);
    bind_softmax(m);
    bind_swiglu(m);
}

}  // namespace tiny_llm
