// Memory for numbers, not set to anything, aligned to cache lines, so that 16 tokens of one column are one line.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

namespace halfbit {

struct Free {
    void operator()(float *p) const { ::operator delete[](p, std::align_val_t{64}); }
};
using Floats = std::unique_ptr<float[], Free>;

inline Floats floats(int64_t count) {
    return Floats(static_cast<float *>(::operator new[](sizeof(float) * std::max<int64_t>(count, 1), std::align_val_t{64})));
}

}  // namespace halfbit
