// `rotation.rotate` of one token, to the bit: the same additions in the same order.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace halfbit {

inline void rotate(const float *x, const int8_t *signs, int64_t columns, float *y) {
    const int64_t size = std::min<int64_t>(columns & -columns, 256);
    const float scale = static_cast<float>(1 / std::sqrt(static_cast<double>(size)));
    for (int64_t c = 0; c < columns; ++c) y[c] = signs[c] < 0 ? -x[c] : x[c];
    for (float *block = y; block < y + columns; block += size) {
        for (int64_t half = 1; half < size; half *= 2)
            for (int64_t pair = 0; pair < size; pair += 2 * half)
                for (int64_t c = pair; c < pair + half; ++c) {
                    const float a = block[c], b = block[c + half];
                    block[c] = a + b, block[c + half] = a - b;
                }
        for (int64_t c = 0; c < size; ++c) block[c] *= scale;
    }
}

}  // namespace halfbit
