// A graph of kernels that is played again as one lazy operation. Owns what is kept of it.
//
// To MLX each kernel of a step is an array to make, a node to walk to and a task to hand over, and Python makes all of
// them anew, on the cores that compute. But steps of the same shapes differ in their inputs alone.
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "../pool.h"
#include "bindings.h"
#include "mlx/primitives.h"
#include "op.h"

namespace nb = nanobind;

namespace tiny_llm {
namespace {

constexpr int kChainSlot = 7;  // no kernel's

// What a kernel reads or writes: input, output or constant number `at` of the chain, or what lies `at` bytes into its
// scratch. Steps [from, until] need it.
struct Value {
    enum { scratch, input, output, constant } kind;
    size_t at, bytes = 0, from = 0, until = 0;
};

struct Step {
    Run run;
    std::vector<size_t> in, out;  // numbers of values
};

struct Program {
    std::vector<Value> values;
    std::vector<Step> steps;  // each after those that it reads of
    std::vector<mx::array> constants;
    std::vector<Spec> outputs;
    size_t scratch_bytes = 0;

    void* place(size_t number, const std::vector<const void*>& in, const std::vector<void*>& out, char* room) const {
        const Value& value = values[number];
        switch (value.kind) {
            case Value::input: return const_cast<void*>(in[value.at]);
            case Value::output: return out[value.at];
            case Value::constant: return const_cast<char*>(constants[value.at].data<char>());
            default: return room + value.at;
        }
    }

    void run(const std::vector<const void*>& in, const std::vector<void*>& out) const {
        char* room = static_cast<char*>(scratch(kChainSlot, scratch_bytes));
        std::vector<const void*> from;
        std::vector<void*> to;
        for (const Step& step : steps) {
            from.clear(), to.clear();
            for (const size_t number : step.in) from.push_back(place(number, in, out, room));
            for (const size_t number : step.out) to.push_back(place(number, in, out, room));
            step.run(from, to);
        }
    }
};

// Makes a program of a graph that has not been computed.
class Reader {
public:
    Reader(const std::vector<mx::array>& inputs, const std::vector<mx::array>& outputs) {
        for (size_t i = 0; i < inputs.size(); ++i) number_[inputs[i].id()] = add({Value::input, i});
        for (const mx::array& output : outputs) visit(output);
        for (const mx::array& output : outputs) give(output);
        lay_out();
    }
    Program program;

private:
    size_t add(Value value) {
        program.values.push_back(value);
        return program.values.size() - 1;
    }

    // Adds what computes an array, unless it is known, and returns the value's number.
    size_t visit(const mx::array& a) {
        if (const auto known = number_.find(a.id()); known != number_.end()) return known->second;
        if (!a.has_primitive()) {
            program.constants.push_back(a);
            return number_[a.id()] = add({Value::constant, program.constants.size() - 1});
        }
        if (std::strcmp(a.primitive().name(), "Reshape") == 0)  // of what lies in row order, as all that kernels give
            return number_[a.id()] = visit(a.inputs()[0]);
        const Call* call = call_of(a);
        if (!call) throw std::invalid_argument(std::string("[chain] expected kernels alone, got ") + a.primitive().name());
        add_step(*call, a.inputs(), a.outputs());
        return number_.at(a.id());
    }

    void add_step(const Call& call, const std::vector<mx::array>& inputs, const std::vector<mx::array>& outputs) {
        Step step{call.run, {}, {}};
        for (const mx::array& input : inputs) step.in.push_back(visit(input));
        const size_t now = program.steps.size();
        for (const size_t number : step.in) program.values[number].until = now;
        for (size_t i = 0; i < outputs.size(); ++i) {
            const int source = call.outputs[i].in_place;
            step.out.push_back(source < 0 ? add({Value::scratch, 0, outputs[i].nbytes(), now, now}) : step.in[source]);
            number_[outputs[i].id()] = step.out.back();
        }
        program.steps.push_back(std::move(step));
    }

    // Makes a value the chain's next output: an input that is changed where it lies, or what gets memory of its own.
    void give(const mx::array& a) {
        Value& value = program.values[number_.at(a.id())];
        if (value.kind != Value::scratch && value.kind != Value::input)
            throw std::invalid_argument("[chain] expected outputs that differ, and are computed");
        const int source = value.kind == Value::input ? static_cast<int>(value.at) : -1;
        value.kind = Value::output, value.at = program.outputs.size();
        program.outputs.push_back({a.shape(), a.dtype(), source});
    }

    // Gives values their places in scratch: each takes the smallest part that holds it, of those that nobody needs any
    // more, else the largest, which grows.
    void lay_out() {
        struct Part {
            size_t bytes, until;
            std::vector<Value*> held;
        };
        std::vector<Part> parts;
        for (Value& value : program.values) {
            if (value.kind != Value::scratch) continue;
            const size_t bytes = (value.bytes + 63) / 64 * 64;
            Part* best = nullptr;
            for (Part& part : parts) {
                if (part.until >= value.from) continue;
                const bool fits = part.bytes >= bytes;
                if (!best || (fits ? best->bytes < bytes || part.bytes < best->bytes : best->bytes < part.bytes)) best = &part;
            }
            if (!best) best = &parts.emplace_back();
            best->bytes = std::max(best->bytes, bytes), best->until = value.until;
            best->held.push_back(&value);
        }
        for (const Part& part : parts) {
            for (Value* value : part.held) value->at = program.scratch_bytes;
            program.scratch_bytes += part.bytes;
        }
    }

    std::unordered_map<std::uintptr_t, size_t> number_;  // of an array's value, by its id
};

class Chain {
public:
    Chain(const std::vector<mx::array>& inputs, const std::vector<mx::array>& outputs)
        : program_(std::make_shared<const Program>(Reader(inputs, outputs).program)) {
        for (const mx::array& input : inputs) like_.push_back({input.shape(), input.dtype()});
    }

    std::vector<mx::array> operator()(std::vector<mx::array> inputs) const {
        for (size_t i = 0; i < like_.size(); ++i)
            if (i >= inputs.size() || inputs[i].shape() != like_[i].shape || inputs[i].dtype() != like_[i].dtype)
                throw std::invalid_argument("[chain] expected inputs like those that it was made with");
        return call("chain", std::move(inputs), program_->outputs, [program = program_](auto& in, auto& out) { program->run(in, out); });
    }

private:
    std::shared_ptr<const Program> program_;
    std::vector<Spec> like_;
};

}  // namespace

void bind_chain(nb::module_& m) {
    nb::class_<Chain>(m, "Chain", "Kernels' calls, from inputs to outputs that are not computed yet, as one operation.")
        .def(nb::init<const std::vector<mx::array>&, const std::vector<mx::array>&>(), nb::arg("inputs"), nb::arg("outputs"))
        .def("__call__", &Chain::operator(), nb::arg("inputs"), "The outputs for other inputs, of the same shapes and dtypes.");
}

}  // namespace tiny_llm
