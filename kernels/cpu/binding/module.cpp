// The Python module tiny_llm._cpu: settings of the kernels, and each op's binding.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <stdexcept>
#include <string>

#include "../isa.h"
#include "../pool.h"
#include "bindings.h"

namespace nb = nanobind;

namespace tiny_llm {

NB_MODULE(_cpu, m) {
    m.doc() = "CPU kernels as lazy MLX operations.";
    m.def("isa", [] { return std::string(isa_name(isa())); }, "The instruction set in use.");
    m.def("best_isa", [] { return std::string(isa_name(best_isa())); }, "The best one that this machine has.");
    m.def("set_isa", [](const std::string& name) {
        if (!set_isa(name.c_str()))
            throw std::invalid_argument("isa is '" + name + "', expected portable, avx2, avx512 or amx, at most " +
                                        isa_name(best_isa()) + " on this machine");
    }, nb::arg("name"), "Use another instruction set; only while no kernel runs.");
    m.def("num_threads", &num_threads, "Threads that a kernel uses.");
    m.def("set_num_threads", &set_num_threads, nb::arg("threads"), nb::call_guard<nb::gil_scoped_release>(),
          "Change their number.");
    bind_matrix(m);
    bind_linear(m);  // first: other signatures name its class
    bind_rms_norm(m);
}

}  // namespace tiny_llm
