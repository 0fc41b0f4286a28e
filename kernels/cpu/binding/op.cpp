#include "op.h"

#include <atomic>
#include <chrono>
#include <cstring>
#include <sstream>
#include <stdexcept>

#include "mlx/backend/cpu/encoder.h"
#include "mlx/primitives.h"

namespace tiny_llm {
namespace {

// Copies any strided array into row order.
void gather(const char* from, char* to, const mx::Shape& shape, const mx::Strides& strides, size_t axis, size_t size) {
    if (axis == shape.size()) {
        std::memcpy(to, from, size);
        return;
    }
    size_t inner = size;
    for (size_t i = axis + 1; i < shape.size(); ++i) inner *= shape[i];
    for (int i = 0; i < shape[axis]; ++i)
        gather(from + i * strides[axis] * static_cast<int64_t>(size), to + i * inner, shape, strides, axis + 1, size);
}

using Clock = std::chrono::steady_clock;

// Time inside of kernels, of the one stream that runs them; anybody may look.
class Spent {
public:
    void operator+=(Clock::duration time) { ticks_.fetch_add(time.count(), std::memory_order_relaxed); }
    double seconds() const {
        return std::chrono::duration<double>(Clock::duration(ticks_.load(std::memory_order_relaxed))).count();
    }

private:
    std::atomic<Clock::rep> ticks_{0};
} spent;

class Kernel : public mx::Primitive {
public:
    Kernel(mx::Stream stream, const char* name, Call call) : Primitive(stream), name_(name), call_(std::move(call)) {}

    const Call& call() const { return call_; }

    void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
        auto& encoder = mx::cpu::get_command_encoder(stream());
        std::vector<const void*> in;
        for (const auto& input : inputs) in.push_back(contiguous(input, encoder));
        std::vector<void*> out;
        for (size_t i = 0; i < outputs.size(); ++i) {
            const int source = call_.outputs[i].in_place;
            if (source >= 0 && inputs[source].flags().row_contiguous) {
                outputs[i].copy_shared_buffer(inputs[source]);
            } else {
                outputs[i].set_data(mx::allocator::malloc(outputs[i].nbytes()));
                if (source >= 0)  // not in row order where it lies: change a copy
                    encoder.dispatch([to = outputs[i].data<char>(), from = in[source], bytes = outputs[i].nbytes()] {
                        std::memcpy(to, from, bytes);
                    });
            }
            out.push_back(outputs[i].data<char>());
        }
        encoder.dispatch([run = call_.run, in = std::move(in), out = std::move(out)] {
            const auto began = Clock::now();
            run(in, out);
            spent += Clock::now() - began;
        });
    }

    void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
        throw std::runtime_error(std::string("[") + name_ + "] this is a CPU kernel; the stream is a GPU's.");
    }

    const char* name() const override { return name_; }

private:
    static const void* contiguous(const mx::array& input, mx::cpu::CommandEncoder& encoder) {
        if (input.flags().row_contiguous || input.size() == 0) return input.data<char>();
        mx::array copy(input.shape(), input.dtype(), nullptr, {});
        copy.set_data(mx::allocator::malloc(copy.nbytes()));
        const char* from = input.data<char>();
        char* to = copy.data<char>();
        encoder.dispatch([from, to, shape = input.shape(), strides = input.strides(), size = input.itemsize()] {
            gather(from, to, shape, strides, 0, size);
        });
        encoder.add_temporary(std::move(copy));
        return to;
    }

    const char* name_;
    Call call_;
};

}  // namespace

std::vector<mx::array> call(const char* name, std::vector<mx::array> inputs, std::vector<Spec> outputs, Run run) {
    std::vector<mx::Shape> shapes;
    std::vector<mx::Dtype> dtypes;
    for (const auto& output : outputs) {
        shapes.push_back(output.shape);
        dtypes.push_back(output.dtype);
    }
    const auto stream = mx::default_stream(mx::Device::cpu);
    auto kernel = std::make_shared<Kernel>(stream, name, Call{std::move(outputs), std::move(run)});
    return mx::array::make_arrays(std::move(shapes), dtypes, std::move(kernel), std::move(inputs));
}

const Call* call_of(const mx::array& a) {
    const auto* kernel = a.has_primitive() ? dynamic_cast<const Kernel*>(&a.primitive()) : nullptr;
    return kernel ? &kernel->call() : nullptr;
}

double kernel_seconds() { return spent.seconds(); }

std::string describe(const mx::array& a) {
    std::ostringstream text;
    text << a.dtype() << " [";
    for (size_t i = 0; i < a.ndim(); ++i) text << (i ? ", " : "") << a.shape(i);
    text << "]";
    return text.str();
}

void refuse(const char* op, const std::string& expected, const mx::array& got) {
    throw std::invalid_argument("[" + std::string(op) + "] expected " + expected + ", got " + describe(got));
}

}  // namespace tiny_llm
