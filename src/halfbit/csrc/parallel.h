// parallel(threads, items, work): work(i) for every i below items, in any order, on at most `threads` threads.
//
// The threads are those of the OpenMP runtime that torch has loaded, found among the libraries of the process. A runtime of
// our own, or plain threads, would fight for the cores with torch's workers, which spin for a while after each operator: on
// two cores that cost all that the second core gains. Where there is no such runtime, plain threads do it; starting one
// costs about 20 microseconds, so callers ask for one thread where the work is tiny.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#ifdef __linux__
#include <dlfcn.h>
#include <link.h>

#include <cstring>
#endif

namespace halfbit {

// GOMP_parallel(function, data, threads, flags): runs function(data) on a team of threads, the caller one of them.
// libgomp's entry point for compiled code; LLVM's and Intel's runtimes have it too.
using Team = void (*)(void (*)(void *), void *, unsigned, unsigned);

inline Team find_team() {
    Team team = nullptr;
#ifdef __linux__
    dl_iterate_phdr(
        [](dl_phdr_info *library, size_t, void *found) {
            const char *slash = std::strrchr(library->dlpi_name, '/');
            const char *name = slash ? slash + 1 : library->dlpi_name;
            if (std::strncmp(name, "libgomp", 7) && std::strncmp(name, "libomp", 6) && std::strncmp(name, "libiomp", 7))
                return 0;
            // the library is loaded already: this takes a handle, it loads nothing
            if (void *handle = dlopen(library->dlpi_name, RTLD_LAZY | RTLD_NOLOAD))
                *static_cast<Team *>(found) = reinterpret_cast<Team>(dlsym(handle, "GOMP_parallel"));
            return *static_cast<Team *>(found) ? 1 : 0;
        },
        &team);
#endif
    return team;
}

// The first exception that `work` throws ends the call and is thrown here.
template <class Work>
void parallel(int64_t threads, int64_t items, const Work &work) {
    std::atomic<int64_t> next{0};
    std::exception_ptr failure;
    std::mutex failing;
    const auto run = [&] {
        try {
            for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) work(i);
        } catch (...) {
            next = items;
            const std::lock_guard<std::mutex> lock(failing);
            if (!failure) failure = std::current_exception();
        }
    };
    const int64_t wanted = std::min(threads, items);
    static const Team team = find_team();
    if (wanted > 1 && team) {
        team([](void *body) { (*static_cast<decltype(run) *>(body))(); }, const_cast<void *>(static_cast<const void *>(&run)),
             static_cast<unsigned>(wanted), 0);
    } else {
        std::vector<std::thread> others;
        if (wanted > 1) others.reserve(wanted - 1);
        try {
            for (int64_t t = 1; t < wanted; ++t) others.emplace_back(run);
        } catch (const std::system_error &) {
            // the system gives no more threads: the ones we have do the work
        }
        run();
        for (auto &thread : others) thread.join();
    }
    if (failure) std::rethrow_exception(failure);
}

}  // namespace halfbit
