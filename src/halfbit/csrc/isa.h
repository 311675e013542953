// Which instructions the kernels use: the best this CPU has, or less where a test asks for less.
#pragma once

#include <atomic>
#include <stdexcept>
#include <string>

#if (defined(__x86_64__) || defined(__i386__)) && (defined(__GNUC__) || defined(__clang__))
#define HALFBIT_X86 1
#endif

// What is between the two may use these instructions, and must run on CPUs that have them only.
#define HALFBIT_PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define HALFBIT_TARGET(names) HALFBIT_PRAGMA(clang attribute push(__attribute__((target(names))), apply_to = function))
#define HALFBIT_TARGET_END HALFBIT_PRAGMA(clang attribute pop)
#else
#define HALFBIT_TARGET(names) HALFBIT_PRAGMA(GCC push_options) HALFBIT_PRAGMA(GCC target(names))
#define HALFBIT_TARGET_END HALFBIT_PRAGMA(GCC pop_options)
#endif

// Before a loop: `count` rounds without a jump between them.
#ifdef __clang__
#define HALFBIT_UNROLL(count) HALFBIT_PRAGMA(unroll count)
#else
#define HALFBIT_UNROLL(count) HALFBIT_PRAGMA(GCC unroll count)
#endif

namespace halfbit {

// Ordered: a CPU that has one has all before it.
enum class Isa { portable, avx2, avx512, avx512vnni };

inline constexpr const char *isa_names[] = {"portable", "avx2", "avx512", "avx512vnni"};

inline Isa best_isa() {
#ifdef HALFBIT_X86
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("bmi2");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f");
    // sums of products of bytes, and fields of any width as bytes: Intel since Ice Lake, AMD since Zen 4
    if (avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
        __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
        return Isa::avx512vnni;
    if (avx512) return Isa::avx512;
    if (avx2) return Isa::avx2;
#endif
    return Isa::portable;
}

inline std::atomic<Isa> active_isa{best_isa()};

// The most the kernels may use from now on; "best" asks for all the CPU has.
inline void set_isa(const std::string &name) {
    for (int i = 0; i <= static_cast<int>(best_isa()); ++i)
        if (name == isa_names[i]) return active_isa.store(static_cast<Isa>(i));
    if (name != "best") throw std::invalid_argument("this CPU does not have \"" + name + "\"");
    active_isa.store(best_isa());
}

}  // namespace halfbit
