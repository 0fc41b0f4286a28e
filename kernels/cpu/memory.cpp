#include "memory.h"

#include <stdint.h>
#include <sys/mman.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <new>

namespace tiny_llm {
namespace {

constexpr size_t kHuge = size_t{2} << 20;
constexpr size_t kRegion = size_t{64} << 20;  // small blocks share; pages that nobody touches cost nothing

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

class Region {
public:
    explicit Region(size_t bytes) : mapped_(bytes < kHuge ? bytes : bytes + kHuge) {
        base_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (base_ == MAP_FAILED) throw std::bad_alloc();
        next_ = static_cast<char*>(base_);
        end_ = next_ + mapped_;
        if (bytes < kHuge) return;
        next_ = reinterpret_cast<char*>(round_up(reinterpret_cast<size_t>(base_), kHuge));
#if defined(MADV_HUGEPAGE)
        madvise(next_, end_ - next_, MADV_HUGEPAGE);  // advice: without huge pages it is merely slower
#endif
    }
    Region(const Region&) = delete;
    Region& operator=(const Region&) = delete;
    ~Region() { munmap(base_, mapped_); }

    void* take(size_t bytes) {
        if (static_cast<size_t>(end_ - next_) < bytes) return nullptr;
        void* taken = next_;
        next_ += bytes;
        return taken;
    }

private:
    void* base_;
    size_t mapped_;
    char* next_;
    char* end_;
};

size_t checked(size_t bytes) {
    if (bytes > PTRDIFF_MAX) throw std::bad_alloc();
    return round_up(std::max<size_t>(bytes, 1), 64);
}

}  // namespace

Block allocate_pool(size_t bytes) {
    bytes = checked(bytes);
    auto region = std::make_shared<Region>(bytes);
    return {region->take(bytes), [region] {}};
}

Block allocate_weights(size_t bytes) {
    static std::mutex mutex;
    static std::weak_ptr<Region> open;  // the region that still has room, kept alive by its blocks
    bytes = checked(bytes);
    const std::lock_guard lock(mutex);
    auto region = open.lock();
    void* data = region ? region->take(bytes) : nullptr;
    if (!data) {
        region = std::make_shared<Region>(std::max(bytes, kRegion));
        data = region->take(bytes);
        if (bytes < kRegion) open = region;
    }
    return {data, [region] {}};
}

}  // namespace tiny_llm
