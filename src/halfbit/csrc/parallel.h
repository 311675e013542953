// parallel(threads, items, work): work(i) for every i below items, in any order, on at most `threads` threads.
//
// Plain threads and not OpenMP: torch brings an OpenMP runtime of its own, and idle workers of two runtimes spin against
// each other. Starting a thread costs about 20 microseconds, so callers ask for one thread where the work is tiny.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace halfbit {

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
    std::vector<std::thread> others;
    const int64_t wanted = std::min(threads, items) - 1;
    if (wanted > 0) others.reserve(wanted);
    try {
        for (int64_t t = 0; t < wanted; ++t) others.emplace_back(run);
    } catch (const std::system_error &) {
        // the system gives no more threads: the ones we have do the work
    }
    run();
    for (auto &thread : others) thread.join();
    if (failure) std::rethrow_exception(failure);
}

}  // namespace halfbit
