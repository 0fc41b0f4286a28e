#include "cores.h"

#include <algorithm>
#include <fstream>
#include <set>
#include <string>
#include <thread>
#include <utility>

#if defined(__linux__)
#include <sched.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace tiny_llm {
namespace {

int logical_cores() { return static_cast<int>(std::max(1u, std::thread::hardware_concurrency())); }

#if defined(__linux__)
// A container's share of time, in whole cores; no limit reads as none. Control groups 2, then 1.
int quota_cores() {
    double quota = 0, period = 0;
    if (!(std::ifstream("/sys/fs/cgroup/cpu.max") >> quota >> period)) {
        std::ifstream("/sys/fs/cgroup/cpu/cpu.cfs_quota_us") >> quota;
        std::ifstream("/sys/fs/cgroup/cpu/cpu.cfs_period_us") >> period;
    }
    if (quota <= 0 || period <= 0) return logical_cores();
    return std::max(1, static_cast<int>(quota / period + 0.5));
}

int read_topology(int cpu, const char* name) {
    std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/" + name);
    int value = -1;
    return file >> value ? value : -1;
}

// Hardware threads of one core count once. Where the system does not say, each is a core.
int affine_cores() {
    cpu_set_t allowed;
    CPU_ZERO(&allowed);
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return logical_cores();
    std::set<std::pair<int, int>> cores;
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
        if (!CPU_ISSET(cpu, &allowed)) continue;
        const int core = read_topology(cpu, "core_id");
        cores.emplace(core < 0 ? -1 : read_topology(cpu, "physical_package_id"), core < 0 ? cpu : core);
    }
    return static_cast<int>(cores.size());
}
#endif

}  // namespace

int physical_cores() {
#if defined(__linux__)
    return std::max(1, std::min(affine_cores(), quota_cores()));
#elif defined(__APPLE__)
    int cores = 0;  // the fast ones
    size_t size = sizeof cores;
    if (sysctlbyname("hw.perflevel0.physicalcpu", &cores, &size, nullptr, 0) == 0 && cores > 0) return cores;
    return logical_cores();
#else
    return logical_cores();
#endif
}

}  // namespace tiny_llm
