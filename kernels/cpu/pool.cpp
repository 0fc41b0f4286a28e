#include "pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace tiny_llm {
namespace {

// Long enough to bridge the gap between two ops of a step, short enough to be no load when idle.
constexpr auto kSpin = std::chrono::microseconds(40);

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Waits until `value` differs from `old`: first by looking, then asleep.
void wait_change(std::atomic<uint32_t>& value, uint32_t old, std::atomic<int>& sleepers) {
    const auto until = std::chrono::steady_clock::now() + kSpin;
    do {
        for (int i = 0; i < 32; ++i) {
            if (value.load(std::memory_order_acquire) != old) return;
            pause();
        }
    } while (std::chrono::steady_clock::now() < until);
    sleepers.fetch_add(1);
    while (value.load() == old) value.wait(old);
    sleepers.fetch_sub(1);
}

void change(std::atomic<uint32_t>& value, std::atomic<int>& sleepers) {
    value.fetch_add(1);
    if (sleepers.load() > 0) value.notify_all();
}

class Pool {
public:
    explicit Pool(int threads) {
        for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
    }

    ~Pool() {
        stopping_.store(true);
        change(epoch_, epoch_sleepers_);
        for (auto& worker : workers_) worker.join();
    }

    int threads() const { return static_cast<int>(workers_.size()) + 1; }

    void run(int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
        body_ = body, context_ = context, count_ = count, grain_ = grain;
        next_.store(0, std::memory_order_relaxed);
        state_.store(kOpen, std::memory_order_release);
        change(epoch_, epoch_sleepers_);
        take_chunks();
        // Closed: who has not come by now does not come. Then wait for those inside.
        const uint32_t closed = state_.fetch_and(~kOpen) & ~kOpen;
        for (uint32_t inside = closed; inside != 0; inside = state_.load()) {
            wait_change(state_, inside, state_sleepers_);
        }
    }

private:
    static constexpr uint32_t kOpen = 1u << 31;  // the low bits of state_ count the workers inside

    void work() {
        uint32_t seen = 0;
        for (;;) {
            wait_change(epoch_, seen, epoch_sleepers_);
            seen = epoch_.load();
            if (stopping_.load()) return;
            if (!enter()) continue;
            take_chunks();
            state_.fetch_sub(1);
            if (state_sleepers_.load() > 0) state_.notify_all();
        }
    }

    bool enter() {
        uint32_t state = state_.load();
        while (state & kOpen)
            if (state_.compare_exchange_weak(state, state + 1)) return true;
        return false;
    }

    void take_chunks() {
        for (;;) {
            const int64_t begin = next_.fetch_add(grain_, std::memory_order_relaxed);
            if (begin >= count_) return;
            body_(context_, begin, std::min(begin + grain_, count_));
        }
    }

    void (*body_)(void*, int64_t, int64_t) = nullptr;
    void* context_ = nullptr;
    int64_t count_ = 0, grain_ = 1;
    alignas(64) std::atomic<int64_t> next_{0};
    alignas(64) std::atomic<uint32_t> state_{0};
    std::atomic<int> state_sleepers_{0};
    alignas(64) std::atomic<uint32_t> epoch_{0};
    std::atomic<int> epoch_sleepers_{0};
    std::atomic<bool> stopping_{false};
    std::vector<std::thread> workers_;
};

// Never destroyed: at exit a thread of MLX may still run a kernel.
struct Shared {
    std::mutex mutex;
    std::unique_ptr<Pool> pool;
    std::atomic<int> threads{0};
};

Shared& shared() {
    static Shared* value = new Shared;
    return *value;
}

#if defined(__linux__)
int quota_cores() {
    std::ifstream file("/sys/fs/cgroup/cpu.max");
    double quota = 0, period = 0;
    if (!(file >> quota >> period) || period <= 0) return 1 << 20;  // "max" does not read as a number
    return std::max(1, static_cast<int>(quota / period + 0.5));
}

int read_topology(int cpu, const char* name) {
    std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/" + name);
    int value = -1;
    file >> value;
    return value;
}

int affine_cores() {
    cpu_set_t allowed;
    CPU_ZERO(&allowed);
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return std::thread::hardware_concurrency();
    std::set<std::pair<int, int>> cores;
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
        if (!CPU_ISSET(cpu, &allowed)) continue;
        const int core = read_topology(cpu, "core_id");
        cores.emplace(read_topology(cpu, "physical_package_id"), core < 0 ? cpu : core);
    }
    return static_cast<int>(cores.size());
}
#endif

}  // namespace

int physical_cores() {
#if defined(__linux__)
    return std::max(1, std::min(affine_cores(), quota_cores()));
#elif defined(__APPLE__)
    int cores = 0;
    size_t size = sizeof cores;
    if (sysctlbyname("hw.perflevel0.physicalcpu", &cores, &size, nullptr, 0) == 0 && cores > 0) return cores;
    return std::max(1u, std::thread::hardware_concurrency());
#else
    return std::max(1u, std::thread::hardware_concurrency());
#endif
}

int num_threads() {
    auto& all = shared();
    if (const int threads = all.threads.load()) return threads;
    set_num_threads(physical_cores());
    return all.threads.load();
}

void set_num_threads(int threads) {
    auto& all = shared();
    const std::lock_guard lock(all.mutex);
    threads = std::max(1, threads);
    if (all.pool && all.pool->threads() == threads) return;
    all.pool.reset();
    all.pool = std::make_unique<Pool>(threads);
    all.threads.store(threads);
}

void parallel_chunks(int64_t count, int64_t grain, void (*run)(void*, int64_t, int64_t), void* context) {
    if (count <= 0) return;
    auto& all = shared();
    if (count > grain && num_threads() > 1) {
        const std::unique_lock lock(all.mutex, std::try_to_lock);
        if (lock) return all.pool->run(count, grain, run, context);
    }
    run(context, 0, count);
}

void* scratch(int slot, size_t bytes) {
    struct Buffer {
        void* data = nullptr;
        size_t size = 0;
        ~Buffer() { std::free(data); }
    };
    thread_local Buffer buffers[kScratchSlots];
    Buffer& buffer = buffers[slot];
    if (buffer.size < bytes) {
        std::free(buffer.data);
        buffer.size = (bytes + bytes / 2 + 63) / 64 * 64;
        buffer.data = std::aligned_alloc(64, buffer.size);
        if (!buffer.data) {
            std::fprintf(stderr, "tiny_llm: no memory for a kernel's %zu bytes of scratch\n", buffer.size);
            std::abort();
        }
    }
    return buffer.data;
}

}  // namespace tiny_llm
