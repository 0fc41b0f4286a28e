// A graph that is played again, in which all that kernels do in a row is one operation.
//
// To MLX each kernel of a step is an array to make, a node to walk to and a task to hand over, and Python makes all of
// them anew, on the cores that compute. But steps of the same shapes differ in their inputs alone.
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
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

constexpr int kChainSlot = 7;  // of scratch; no kernel's

// What is given or computed. Who changes it where it lies makes no other.
struct Value {
    Spec spec;
    std::optional<mx::array> constant;
    size_t until = 0;  // the last node that reads it, if one does
    bool is_read = false;
};
using Arrays = std::vector<std::optional<mx::array>>;  // of values, by their numbers

mx::array in_shape(const mx::array& a, const mx::Shape& shape) { return a.shape() == shape ? a : mx::reshape(a, shape); }

// An operation: a kernel's, or MLX's own.
struct Node {
    std::shared_ptr<mx::Primitive> primitive;
    const Call* kernel;
    std::vector<size_t> in, out;    // numbers of values
    std::vector<mx::Shape> shapes;  // in which it reads them
    std::vector<mx::Shape> given;
    std::vector<mx::Dtype> dtypes;

    void run(Arrays& arrays) const {
        std::vector<mx::array> inputs;
        for (size_t i = 0; i < in.size(); ++i) inputs.push_back(in_shape(*arrays[in[i]], shapes[i]));
        auto outputs = mx::array::make_arrays(given, dtypes, primitive, std::move(inputs));
        for (size_t i = 0; i < out.size(); ++i) arrays[out[i]] = std::move(outputs[i]);
    }
};

// Kernels in a row. What nobody else reads lies in scratch.
class Row {
public:
    // Adds a kernel's node. The row goes as far as node `end`.
    void add(const Node& node, const std::vector<Value>& values, size_t end) {
        Step step{node.kernel->run, {}, {}};
        for (const size_t v : node.in) step.in.push_back(place(v, values[v], end, true));
        for (const size_t v : node.out) {
            step.out.push_back(place(v, values[v], end, false));
            Place& place = places_[step.out.back()];
            if (place.kind != Place::input) continue;
            Spec changed = values[v].spec;
            changed.in_place = static_cast<int>(place.at);
            place.kind = Place::output, place.at = give(v, changed);
        }
        steps_.push_back(std::move(step));
    }

    // Gives values their places in scratch: each takes the smallest part that holds it, of those that nobody needs any
    // more, else the largest, which grows.
    void lay_out() {
        struct Part {
            size_t bytes, until;
            std::vector<Place*> held;
        };
        std::vector<Part> parts;
        for (Place& place : places_) {
            if (place.kind != Place::scratch) continue;
            const size_t bytes = (place.bytes + 63) / 64 * 64;
            Part* best = nullptr;
            for (Part& part : parts)
                if (part.until < place.from &&
                    (!best || (part.bytes < bytes ? part.bytes > best->bytes
                                                  : best->bytes < bytes || part.bytes < best->bytes)))
                    best = &part;
            if (!best) best = &parts.emplace_back();
            best->bytes = std::max(best->bytes, bytes), best->until = place.until;
            best->held.push_back(&place);
        }
        for (const Part& part : parts) {
            for (Place* place : part.held) place->at = scratch_bytes_;
            scratch_bytes_ += part.bytes;
        }
    }

    static void run(const std::shared_ptr<const Row>& row, Arrays& arrays) {
        std::vector<mx::array> inputs;
        for (const size_t v : row->inputs_) inputs.push_back(*arrays[v]);
        auto results = call("chain", std::move(inputs), row->outputs_, [row](auto& in, auto& out) { row->compute(in, out); });
        for (size_t i = 0; i < results.size(); ++i) arrays[row->results_[i]] = std::move(results[i]);
    }

private:
    // Constant, input or output number `at`, or what lies `at` bytes into scratch and is needed by steps [from, until].
    struct Place {
        enum { scratch, constant, input, output } kind;
        size_t at, bytes = 0, from = 0, until = 0;
    };
    struct Step {
        Run run;
        std::vector<size_t> in, out;  // numbers of places
    };

    size_t place(size_t v, const Value& value, size_t end, bool is_read) {
        const auto [known, is_new] = number_.try_emplace(v, places_.size());
        if (is_new && value.constant && value.constant->flags().row_contiguous) {
            places_.push_back({Place::constant, constants_.size()});
            constants_.push_back(*value.constant);
        } else if (is_new && is_read) {
            places_.push_back({Place::input, inputs_.size()});
            inputs_.push_back(v);
        } else if (is_new && value.until >= end) {
            places_.push_back({Place::output, give(v, value.spec)});
        } else if (is_new) {
            size_t bytes = mx::size_of(value.spec.dtype);
            for (const int axis : value.spec.shape) bytes *= axis;
            places_.push_back({Place::scratch, 0, bytes, steps_.size()});
        }
        places_[known->second].until = steps_.size();
        return known->second;
    }

    size_t give(size_t v, Spec spec) {
        results_.push_back(v);
        outputs_.push_back(std::move(spec));
        return results_.size() - 1;
    }

    void compute(const std::vector<const void*>& in, const std::vector<void*>& out) const {
        char* room = static_cast<char*>(scratch(kChainSlot, scratch_bytes_));
        const auto at = [&](size_t number) -> void* {
            const Place& place = places_[number];
            if (place.kind == Place::scratch) return room + place.at;
            if (place.kind == Place::output) return out[place.at];
            return const_cast<void*>(place.kind == Place::input ? in[place.at] : constants_[place.at].data<char>());
        };
        std::vector<const void*> from;
        std::vector<void*> to;
        for (const Step& step : steps_) {
            from.clear(), to.clear();
            for (const size_t number : step.in) from.push_back(at(number));
            for (const size_t number : step.out) to.push_back(at(number));
            step.run(from, to);
        }
    }

    std::vector<Step> steps_;
    std::vector<Place> places_;
    std::unordered_map<size_t, size_t> number_;  // of a value's place
    std::vector<mx::array> constants_;
    std::vector<size_t> inputs_, results_;  // numbers of values
    std::vector<Spec> outputs_;             // of the results
    size_t scratch_bytes_ = 0;
};

// A graph that has not been computed: its nodes, each after those that it needs.
struct Graph {
    std::vector<Value> values;
    std::vector<Node> nodes;
    std::unordered_map<std::uintptr_t, size_t> numbers;  // of arrays' values, by the arrays' ids

    size_t add(const mx::array& a, std::optional<mx::array> constant = {}) {
        values.push_back({{a.shape(), a.dtype()}, std::move(constant)});
        return numbers[a.id()] = values.size() - 1;
    }

    // The number of an array's value, which is added with all that it needs unless it is known.
    size_t visit(const mx::array& a) {
        if (const auto known = numbers.find(a.id()); known != numbers.end()) return known->second;
        if (!a.has_primitive()) return add(a, a);
        if (std::strcmp(a.primitive().name(), "Reshape") == 0) return numbers[a.id()] = visit(a.inputs()[0]);
        Node node{a.primitive_ptr(), call_of(a), {}, {}, {}, {}, {}};
        for (const mx::array& input : a.inputs()) {
            node.in.push_back(visit(input));
            node.shapes.push_back(input.shape());
        }
        read(node.in, nodes.size());
        for (const mx::array& output : a.outputs()) {
            const int source = node.kernel ? node.kernel->outputs[node.out.size()].in_place : -1;
            node.out.push_back(source < 0 ? add(output) : numbers[output.id()] = node.in[source]);
            node.given.push_back(output.shape());
            node.dtypes.push_back(output.dtype());
        }
        nodes.push_back(std::move(node));
        return numbers.at(a.id());
    }

    void read(const std::vector<size_t>& some, size_t node) {
        for (const size_t v : some) values[v].until = node, values[v].is_read = true;
    }
};

class Chain {
public:
    Chain(const std::vector<mx::array>& inputs, const std::vector<mx::array>& outputs) {
        Graph graph;
        for (const mx::array& input : inputs) {
            graph.add(input);
            like_.push_back({input.shape(), input.dtype()});
        }
        for (const mx::array& output : outputs) {
            results_.push_back(graph.visit(output));
            shapes_.push_back(output.shape());
        }
        graph.read(results_, graph.nodes.size());
        for (size_t v = 0; v < inputs.size(); ++v)
            expect(graph.values[v].is_read, "chain", "inputs that are read in the graph alone", inputs[v]);
        keep(graph);
    }

    std::vector<mx::array> operator()(const std::vector<mx::array>& inputs) const {
        Arrays arrays = constants_;
        for (size_t v = 0; v < like_.size(); ++v) {
            if (v >= inputs.size() || inputs[v].shape() != like_[v].shape || inputs[v].dtype() != like_[v].dtype)
                throw std::invalid_argument("[chain] expected inputs like those that it was made with");
            arrays[v] = inputs[v];
        }
        for (const Part& part : parts_) part.row ? Row::run(part.row, arrays) : part.node.run(arrays);
        std::vector<mx::array> outputs;
        for (size_t i = 0; i < results_.size(); ++i) outputs.push_back(in_shape(*arrays[results_[i]], shapes_[i]));
        return outputs;
    }

private:
    struct Part {
        std::shared_ptr<const Row> row;
        Node node;  // where there is no row
    };

    void keep(const Graph& graph) {
        const std::vector<Node>& nodes = graph.nodes;
        for (size_t begin = 0, end; begin < nodes.size(); begin = end) {
            for (end = begin; end < nodes.size() && nodes[end].kernel;) ++end;
            if (end == begin) {
                parts_.push_back({nullptr, nodes[end++]});
                continue;
            }
            auto row = std::make_shared<Row>();
            for (size_t n = begin; n < end; ++n) row->add(nodes[n], graph.values, end);
            row->lay_out();
            parts_.push_back({std::move(row), {}});
        }
        for (const Value& value : graph.values) constants_.push_back(value.constant);
    }

    std::vector<Part> parts_;
    Arrays constants_;
    std::vector<Spec> like_;       // the inputs
    std::vector<size_t> results_;  // numbers of values
    std::vector<mx::Shape> shapes_;
};

}  // namespace

void bind_chain(nb::module_& m) {
    nb::class_<Chain>(m, "Chain", "A graph from inputs to outputs that are not computed yet, to be played again.")
        .def(nb::init<const std::vector<mx::array>&, const std::vector<mx::array>&>(), nb::arg("inputs"), nb::arg("outputs"))
        .def("__call__", &Chain::operator(), nb::arg("inputs"), "The outputs for other inputs, of the same shapes and dtypes.");
}

}  // namespace tiny_llm
