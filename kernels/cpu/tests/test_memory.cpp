#include "../memory.h"

#include <algorithm>
#include <fstream>
#include <new>
#include <string>
#include <thread>

#include "check.h"

using namespace tiny_llm;
using namespace tiny_llm::test;

namespace {

bool all_zero(const Block& block, size_t bytes) {
    const auto* data = static_cast<const char*>(block.data);
    return std::all_of(data, data + bytes, [](char c) { return c == 0; });
}

// Kilobytes of huge pages in the mapping that holds `address`; -1 if the system does not say.
long huge_kilobytes(const void* address) {
    std::ifstream smaps("/proc/self/smaps");
    const auto wanted = reinterpret_cast<unsigned long>(address);
    bool inside = false;
    for (std::string line; std::getline(smaps, line);) {
        unsigned long begin, end;
        long kilobytes;
        if (std::sscanf(line.c_str(), "%lx-%lx ", &begin, &end) == 2) inside = begin <= wanted && wanted < end;
        if (inside && std::sscanf(line.c_str(), "AnonHugePages: %ld kB", &kilobytes) == 1) return kilobytes;
    }
    return -1;
}

bool system_gives_huge_pages() {
    std::ifstream file("/sys/kernel/mm/transparent_hugepage/enabled");
    std::string text;
    return std::getline(file, text) && text.find("[never]") == std::string::npos;
}

}  // namespace

TEST(weights_are_aligned_zeroed_and_apart) {
    std::vector<std::pair<Block, size_t>> blocks;
    for (size_t bytes : {size_t{0}, size_t{1}, size_t{63}, size_t{64}, size_t{1000003}, size_t{40} << 20, size_t{70} << 20}) {
        const Block block = allocate_weights(bytes);
        CHECK(reinterpret_cast<uintptr_t>(block.data) % 64 == 0, "%zu bytes", bytes);
        CHECK(all_zero(block, bytes), "%zu bytes", bytes);
        std::fill_n(static_cast<char*>(block.data), bytes, 1);
        blocks.emplace_back(block, bytes);
    }
    for (const auto& [a, bytes] : blocks)
        for (const auto& [b, others] : blocks)
            CHECK(a.data == b.data || static_cast<char*>(a.data) + bytes <= b.data ||
                  static_cast<char*>(b.data) + others <= a.data, "%zu and %zu bytes overlap", bytes, others);
    for (size_t i : {3, 0, 6, 1, 5, 2, 4}) blocks[i].first.release();
}

TEST(pools_are_aligned_zeroed_and_give_their_pages_back) {
    const Block stays = allocate_weights(1000);
    for (size_t bytes : {size_t{1}, size_t{100000}, (size_t{2} << 20) + 1, size_t{70} << 20}) {
        const Block block = allocate_pool(bytes);
        CHECK(reinterpret_cast<uintptr_t>(block.data) % 64 == 0, "%zu bytes", bytes);
        CHECK(all_zero(block, bytes), "%zu bytes", bytes);
        std::fill_n(static_cast<char*>(block.data), bytes, 1);
        block.release();
    }
    stays.release();
}

TEST(weights_come_in_any_thread) {
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t)
        threads.emplace_back([t] {
            for (int i = 0; i < 50; ++i) {
                const Block block = allocate_weights(1 + 997 * i);
                CHECK(all_zero(block, 1 + 997 * i));
                std::fill_n(static_cast<char*>(block.data), 1 + 997 * i, char(t));
                block.release();
            }
        });
    for (auto& thread : threads) thread.join();
}

#if !defined(TINY_NO_HUGE_PAGES)
TEST(weights_lie_in_huge_pages) {
    const size_t bytes = size_t{64} << 20;
    const Block block = allocate_weights(bytes);
    std::fill_n(static_cast<char*>(block.data), bytes, 1);
    const long huge = huge_kilobytes(block.data);
    if (huge < 0 || !system_gives_huge_pages()) {
        std::printf("  skipped: this system has no huge pages to give\n");
    } else {
        CHECK(huge >= 60 << 10, "%ld of 65536 kB", huge);
    }
    block.release();
}
#endif

TEST(weights_beyond_memory_are_an_error) {
    for (size_t bytes : {SIZE_MAX, SIZE_MAX / 2, size_t{1} << 60}) {
        bool refused = false;
        try {
            allocate_weights(bytes);
        } catch (const std::bad_alloc&) {
            refused = true;
        }
        CHECK(refused, "%zu bytes", bytes);
    }
}
