// The pool under all that is asked of it; the thread sanitizer runs these too.
#include "../pool.h"

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "check.h"

using namespace tiny_llm;
using namespace tiny_llm::test;
using std::chrono::milliseconds;

namespace {

template <class Body>
void parallel(int64_t count, int64_t grain, const Body& body) {
    parallel_chunks(count, grain, [](void* context, int64_t begin, int64_t end) {
        (*static_cast<const Body*>(context))(begin, end);
    }, const_cast<Body*>(&body));
}

// Adds to each item, not atomically: work that is done twice at once, or not seen, is a race.
bool each_item_once(int64_t count, int64_t grain) {
    std::vector<int> items(count);
    std::atomic<bool> even{true};
    parallel(count, grain, [&](int64_t begin, int64_t end) {
        if (begin % grain != 0 || end != std::min(begin + grain, count)) even = false;
        for (int64_t i = begin; i < end; ++i) ++items[i];
    });
    for (int item : items) even = even && item == 1;
    return even;
}

struct Threads {  // puts the number back
    explicit Threads(int threads) : before(num_threads()) { set_num_threads(threads); }
    ~Threads() { set_num_threads(before); }
    int before;
};

double cpu_seconds() {
    rusage used;
    getrusage(RUSAGE_SELF, &used);
    return double(used.ru_utime.tv_sec + used.ru_stime.tv_sec) + 1e-6 * double(used.ru_utime.tv_usec + used.ru_stime.tv_usec);
}

}  // namespace

TEST(pool_does_each_item_once) {
    for (int threads : {1, 2, 3, 8}) {
        const Threads set(threads);
        for (int64_t count : {0, 1, 2, 7, 64, 1000})
            for (int64_t grain : {1, 3, 64, 5000})
                CHECK(each_item_once(count, grain), "threads %d count %d grain %d", threads, int(count), int(grain));
    }
}

TEST(pool_takes_thousands_of_tiny_jobs) {
    const Threads set(2);
    int64_t wrong = 0;
    for (int job = 0; job < 20000; ++job) {
        int64_t sums[4] = {};
        parallel(4, 1, [&](int64_t begin, int64_t) { sums[begin] += job; });
        for (int64_t sum : sums) wrong += sum != job;
    }
    CHECK(wrong == 0, "%d items", int(wrong));
}

// Each chunk waits for all others to begin, so all threads must come, also when they had gone to sleep.
TEST(pool_wakes_those_asleep) {
    const Threads set(3);
    for (int job = 0; job < 60; ++job) {
        std::atomic<int> here{0};
        const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(60);
        parallel(3, 1, [&](int64_t, int64_t) {
            ++here;
            while (here < 3 && std::chrono::steady_clock::now() < until) std::this_thread::yield();
        });
        CHECK(here == 3 && std::chrono::steady_clock::now() < until, "job %d: %d came", job, here.load());
        if (job % 3) std::this_thread::sleep_for(milliseconds(job % 3));
    }
}

TEST(pool_serves_callers_at_once) {
    const Threads set(2);
    std::atomic<int> wrong{0};
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 3; ++caller)
        callers.emplace_back([&, caller] {
            for (int job = 0; job < 2000; ++job) wrong += !each_item_once(1 + (job * 7 + caller) % 90, 1 + job % 5);
        });
    for (auto& caller : callers) caller.join();
    CHECK(wrong == 0, "%d jobs", wrong.load());
}

TEST(pool_changes_its_threads_while_in_use) {
    const Threads set(2);
    std::atomic<int> wrong{0};
    std::atomic<bool> done{false};
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 2; ++caller)
        callers.emplace_back([&] {
            while (!done) wrong += !each_item_once(40, 3);
        });
    for (int change = 0; change < 200; ++change) set_num_threads(1 + change % 5);
    done = true;
    for (auto& caller : callers) caller.join();
    CHECK(wrong == 0, "%d jobs", wrong.load());
}

TEST(pool_work_may_ask_the_pool) {
    const Threads set(3);
    std::atomic<int> inner{0};
    parallel(10, 1, [&](int64_t, int64_t) {
        parallel(5, 1, [&](int64_t, int64_t) { ++inner; });
    });
    CHECK(inner == 50, "%d", inner.load());
}

TEST(pool_keeps_to_sensible_numbers) {
    const Threads set(1);
    for (auto [asked, given] : {std::pair{0, 1}, {-7, 1}, {3, 3}, {1 << 30, kMostThreads}}) {
        set_num_threads(asked);
        CHECK(num_threads() == given, "asked for %d, got %d", asked, num_threads());
    }
    set_num_threads(40);  // more than there are cores
    CHECK(each_item_once(1000, 3));
    CHECK(physical_cores() >= 1 && physical_cores() <= int(std::max(1u, std::thread::hardware_concurrency())),
          "%d of %u", physical_cores(), std::thread::hardware_concurrency());
}

TEST(pool_uses_no_time_when_idle) {
    const Threads set(4);
    CHECK(each_item_once(1000, 3));
    std::this_thread::sleep_for(milliseconds(50));
    const double before = cpu_seconds();
    std::this_thread::sleep_for(milliseconds(200));
    CHECK(cpu_seconds() - before < 0.05, "%.3f s of 0.2", cpu_seconds() - before);
}

// The thread sanitizer allows no threads after a fork, and emulators have none.
#if !defined(TINY_NO_FORK)
TEST(pool_works_in_a_forked_child) {
    const Threads set(3);
    CHECK(each_item_once(1000, 3));
    const pid_t child = fork();
    if (child == 0) {
        bool right = each_item_once(1000, 3);
        set_num_threads(2);
        right = each_item_once(1000, 3) && right;
        _exit(right ? 0 : 1);
    }
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child && status == 0, "status %d", status);
    CHECK(each_item_once(1000, 3));
}
#endif

TEST(scratch_is_aligned_grows_and_belongs_to_a_thread) {
    auto* first = static_cast<char*>(scratch(0, 100));
    auto* second = static_cast<char*>(scratch(1, 100));
    CHECK(reinterpret_cast<uintptr_t>(first) % 64 == 0 && reinterpret_cast<uintptr_t>(second) % 64 == 0);
    CHECK(first + 100 <= second || second + 100 <= first);
    CHECK(scratch(0, 50) == first);
    auto* larger = static_cast<char*>(scratch(0, 1 << 20));
    larger[0] = larger[(1 << 20) - 1] = 1;
    CHECK(scratch(0, 1 << 20) == larger);
    std::thread([&] { CHECK(scratch(0, 100) != larger); }).join();
}
