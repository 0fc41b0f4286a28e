#include "pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include <pthread.h>

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

// A number that threads wait on: first by looking, then asleep.
//
// A waiter counts itself as asleep before it looks for the last time, and who changes the number looks
// at that count afterwards. Both are sequentially consistent, so one of the two sees the other.
class alignas(64) Signal {
public:
    uint32_t get() const { return value_.load(); }
    std::atomic<uint32_t>& value() { return value_; }

    // Returns when the number is no longer `old`. Who looks and yields is not cut off later, while it holds
    // a chunk, for having used up its time: with a busy core a memory-bound loop takes 1.3x, not 1.5x.
    void wait_change(uint32_t old) {
        const auto until = std::chrono::steady_clock::now() + kSpin;
        do {
            for (int i = 0; i < 32; ++i) {
                if (value_.load() != old) return;
                pause();
            }
            std::this_thread::yield();
        } while (std::chrono::steady_clock::now() < until);
        sleepers_.fetch_add(1);
        while (value_.load() == old) value_.wait(old);
        sleepers_.fetch_sub(1);
    }

    // Call after a change. Wakes `most` of those asleep; who is awake sees it anyway.
    void wake(int64_t most) {
        const int64_t asleep = sleepers_.load();
        if (most < asleep) {
            for (int64_t i = 0; i < most; ++i) value_.notify_one();
        } else if (asleep > 0) {
            value_.notify_all();
        }
    }

private:
    std::atomic<uint32_t> value_{0};
    std::atomic<int> sleepers_{0};
};

struct Job {
    int64_t count, grain;
    void (*run)(void*, int64_t, int64_t);
    void* context;
    int shares;
};

// A run of chunks that lie side by side in memory.
struct alignas(64) Share {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
};

class Pool {
public:
    explicit Pool(int threads) : shares_(threads) {
        workers_.reserve(threads - 1);
        try {
            for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
        } catch (const std::system_error&) {  // the system gives no more: those that there are do the work
        }
    }

    ~Pool() {
        stopping_.store(true);
        epoch_.value().fetch_add(1);
        epoch_.wake(threads());
        for (auto& worker : workers_) worker.join();
    }

    int threads() const { return static_cast<int>(workers_.size()) + 1; }

    // Does the job from `begin` on. One caller at a time.
    void run(const Job& job, int64_t begin) {
        job_ = job;
        const int64_t chunks = (job.count - begin - 1) / job.grain + 1;
        job_.shares = static_cast<int>(std::min<int64_t>(chunks, threads()));
        for (int64_t i = 0; i < job_.shares; ++i) {
            shares_[i].next.store(begin + chunks * i / job_.shares * job.grain, std::memory_order_relaxed);
            shares_[i].end = std::min(begin + chunks * (i + 1) / job_.shares * job.grain, job.count);
        }
        inside_.value().store(kOpen);
        epoch_.value().fetch_add(1);
        epoch_.wake(chunks - 1);
        take_chunks(0);
        // Closed: who has not come by now does not come. Then wait for those inside.
        inside_.value().fetch_and(~kOpen);
        while (const uint32_t inside = inside_.get()) inside_.wait_change(inside);
    }

private:
    static constexpr uint32_t kOpen = 1u << 31;  // the low bits of inside_ count the workers at the job

    void work(int self) {
        uint32_t seen = 0;
        for (;;) {
            epoch_.wait_change(seen);
            seen = epoch_.get();
            if (stopping_.load()) return;
            if (!enter()) continue;
            take_chunks(self);
            inside_.value().fetch_sub(1);
            inside_.wake(1);
        }
    }

    // A worker reads the job only once it is counted, and a counted worker is waited for.
    bool enter() {
        uint32_t inside = inside_.get();
        while (inside & kOpen)
            if (inside_.value().compare_exchange_weak(inside, inside + 1)) return true;
        return false;
    }

    // First one's own share, in order, as memory likes it; then what others have not got to.
    void take_chunks(int self) {
        const Job job = job_;
        for (int i = 0; i < job.shares; ++i) {
            Share& share = shares_[(self + i) % job.shares];
            while (share.next.load(std::memory_order_relaxed) < share.end) {
                const int64_t begin = share.next.fetch_add(job.grain, std::memory_order_relaxed);
                if (begin < share.end) job.run(job.context, begin, std::min(begin + job.grain, share.end));
            }
        }
    }

    Job job_{};
    std::vector<Share> shares_;
    Signal inside_, epoch_;
    std::atomic<bool> stopping_{false};
    std::vector<std::thread> workers_;
};

// Never destroyed: at exit a thread of MLX may still run a kernel.
struct Shared {
    std::mutex mutex;
    std::unique_ptr<Pool> pool;  // made at the first work that is worth it
    std::atomic<int> threads{0};
};

Shared& shared();

// A fork takes no threads along: the child makes its own when it needs them.
void watch_forks() {
    pthread_atfork([] { shared().mutex.lock(); }, [] { shared().mutex.unlock(); },
                   [] {
                       (void)shared().pool.release();
                       shared().mutex.unlock();
                   });
}

Shared& shared() {
    static Shared* value = [] {
        watch_forks();
        return new Shared;
    }();
    return *value;
}

// A caller inside of its own work must not ask for the mutex that it holds.
thread_local bool calling = false;

bool run_in_pool(const Job& job, int64_t begin) {
    if (calling || num_threads() == 1) return false;
    auto& all = shared();
    const std::unique_lock lock(all.mutex, std::try_to_lock);
    if (!lock) return false;
    if (!all.pool) all.pool = std::make_unique<Pool>(num_threads());
    calling = true;
    all.pool->run(job, begin);
    calling = false;
    return true;
}

int initial_threads() {
    const char* wanted = std::getenv("TINY_LLM_THREADS");
    if (!wanted || !*wanted) return std::min(physical_cores(), kMostThreads);
    char* end = nullptr;
    const long threads = std::strtol(wanted, &end, 10);
    if (*end == 0 && threads >= 1 && threads <= kMostThreads) return static_cast<int>(threads);
    std::fprintf(stderr, "warning: TINY_LLM_THREADS is '%s', expected 1 to %d; using %d.\n", wanted, kMostThreads,
                 physical_cores());
    return std::min(physical_cores(), kMostThreads);
}

}  // namespace

int num_threads() {
    auto& threads = shared().threads;
    if (const int known = threads.load()) return known;
    static const int initial = initial_threads();
    int none = 0;
    threads.compare_exchange_strong(none, initial);
    return threads.load();
}

void set_num_threads(int threads) {
    auto& all = shared();
    const std::lock_guard lock(all.mutex);
    all.threads.store(std::clamp(threads, 1, kMostThreads));
    if (all.pool && all.pool->threads() != all.threads.load()) all.pool.reset();
}

void parallel_chunks(int64_t count, int64_t grain, void (*run)(void*, int64_t, int64_t), void* context) noexcept {
    const Job job{count, std::max<int64_t>(grain, 1), run, context, 1};
    for (int64_t begin = 0; begin < count; begin += job.grain) {
        if (count - begin > job.grain && run_in_pool(job, begin)) return;
        run(context, begin, std::min(begin + job.grain, count));
    }
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
