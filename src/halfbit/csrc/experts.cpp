// Around the two products of a Mixture-of-Experts layer: tokens sorted by expert, and the weighted sum of what comes back.
//
// With one token torch needs some twenty operators for this, each of which takes 10 to 50 microseconds once other weights have
// passed the caches: as long as the products of two experts.

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "extension.h"
#include "parallel.h"
#include "tensors.h"

namespace nb = nanobind;
using namespace nb::literals;
using halfbit::array;
using halfbit::Array;

namespace {

constexpr int64_t columns_at_once = 256;  // of the sum, that a thread takes where there are several
constexpr int64_t tiny_work = 1 << 16;    // additions that are worth a thread

// Stable counting sort of [tokens, k] choices. places [3, tokens * k]: expert, choice (token * k + which), token of each,
// sorted by expert. Returns how many there are: a choice outside [0, experts) takes none.
int64_t sort(Array<const int64_t, 2> index, Array<int64_t, 1> starts, Array<int64_t, 2> places) {
    const int64_t experts = starts.shape(0) - 1, k = index.shape(1), n = index.shape(0) * k;
    if (experts < 0 || places.shape(0) != 3 || places.shape(1) != n)
        throw std::invalid_argument("starts and places do not fit the choices");
    const auto there = [&](int64_t expert) { return 0 <= expert && expert < experts; };
    int64_t *start = starts.data(), *expert = places.data(), *choice = expert + n, *token = choice + n;
    std::fill_n(start, experts + 1, int64_t{0});
    for (int64_t i = 0; i < n; ++i)
        if (there(index.data()[i])) ++start[index.data()[i] + 1];
    for (int64_t e = 0; e < experts; ++e) start[e + 1] += start[e];
    std::vector<int64_t> next(start, start + experts);
    for (int64_t i = 0; i < n; ++i) {
        if (!there(index.data()[i])) continue;
        const int64_t to = next[index.data()[i]]++;
        expert[to] = index.data()[i], choice[to] = i, token[to] = i / k;
    }
    return start[experts];
}

// total[token] = sum of y * weight over its experts, in the order in which they were sorted.
void sum(Array<const float, 2> y, Array<const int64_t, 1> choices, Array<const float, 2> weights, Array<float, 2> total,
         int threads) {
    const int64_t n = y.shape(0), columns = y.shape(1), tokens = total.shape(0), k = weights.shape(1);
    if (choices.shape(0) != n || weights.shape(0) != tokens || total.shape(1) != columns ||
        std::any_of(choices.data(), choices.data() + n, [&](int64_t c) { return c < 0 || c >= tokens * k; }))
        throw std::invalid_argument("y, choices, weights and the total do not fit together");
    threads = static_cast<int>(std::clamp<int64_t>(n * columns / tiny_work, 1, std::max(threads, 1)));
    const int64_t step = threads > 1 ? columns_at_once : std::max<int64_t>(columns, 1);
    halfbit::parallel(threads, (columns + step - 1) / step, [&](int64_t part) {
        const int64_t first = part * step, last = std::min(first + step, columns);
        for (int64_t t = 0; t < tokens; ++t) std::fill(total.data() + t * columns + first, total.data() + t * columns + last, 0.0f);
        for (int64_t i = 0; i < n; ++i) {
            const float weight = weights.data()[choices.data()[i]], *from = y.data() + i * columns;
            float *to = total.data() + choices.data()[i] / k * columns;
            for (int64_t c = first; c < last; ++c) to[c] += weight * from[c];
        }
    });
}

}  // namespace

HALFBIT_BINDINGS(experts) {
    m.def("experts_sort", [](nb::handle index, nb::handle starts, nb::handle places) {
        return sort(array<const int64_t, 2>(index), array<int64_t, 1>(starts), array<int64_t, 2>(places));
    }, "index"_a, "starts"_a, "places"_a,
          "index int64 [tokens, k] -> starts int64 [experts + 1], places int64 [3, tokens * k]: expert, choice, token; how many");
    m.def("experts_sum", [](nb::handle y, nb::handle choices, nb::handle weights, nb::handle total, int threads) {
        const auto outputs = array<const float, 2>(y);
        const auto of = array<const int64_t, 1>(choices);
        const auto by = array<const float, 2>(weights);
        const auto into = array<float, 2>(total);
        const nb::gil_scoped_release release;
        sum(outputs, of, by, into, threads);
    }, "y"_a, "choices"_a, "weights"_a, "total"_a, "threads"_a,
          "y float32 [n, columns] times weights float32 [tokens, k] of its choices -> into total float32 [tokens, columns]");
}
