// What `ternary.h` says, in the instructions that the CPU has.

#include "ternary.h"

#include <algorithm>
#include <cstring>

#include "floats.h"
#include "isa.h"
#include "parallel.h"

namespace halfbit::ternary {

namespace {

constexpr int64_t panel_tokens = 32;
constexpr int64_t part_tokens = 256;     // x of a chunk for so many stays in the second-level cache
constexpr int64_t tiny_work = 1 << 21;  // weights times tokens that are worth a thread: some 50 microseconds

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A vector of W tokens: N of V.
template <class V, int N>
[[gnu::always_inline]] inline void add_up(const uint16_t *at, const uint16_t *end, const float *x, V (&sum)[N]) {
    constexpr int64_t width = N * sizeof(V) / sizeof(float);
    // two sums each, so that an addition need not wait for the last
    V other[N];
    for (int n = 0; n < N; ++n) sum[n] = V{}, other[n] = V{};
    for (; at < end; at += 4) {
        uint64_t four;
        std::memcpy(&four, at, 8);
        for (int i = 0; i < 4; ++i) {
            const float *column = x + (four >> 16 * i & 0xFFFF) * width;
            for (int n = 0; n < N; ++n) {
                V of_column;
                std::memcpy(&of_column, column + n * width / N, sizeof(V));
                (i % 2 ? other : sum)[n] += of_column;
            }
        }
    }
    for (int n = 0; n < N; ++n) sum[n] += other[n];
}

// One chunk of all rows times one panel, x [257, W], added to sums [rows, stride].
using Chunk = void (*)(const Lists &lists, int64_t chunk, const float *x, const float *levels, int64_t step, float *sums,
                       int64_t stride);

template <class V, int N>
[[gnu::always_inline]] inline void chunk_product(const Lists &lists, int64_t chunk, const float *x, const float *levels,
                                                 int64_t step, float *sums, int64_t stride) {
    const uint16_t *columns = lists.columns();
    const Lists::Place *place = lists.places(chunk);
    for (int64_t row = 0; row < lists.rows; ++row, ++place, sums += stride, levels += step) {
        V minus[N], plus[N];
        add_up<V, N>(columns + place->minus, columns + place->plus, x, minus);
        add_up<V, N>(columns + place->plus, columns + place->end, x, plus);
        for (int n = 0; n < N; ++n) {
            V y;
            float *to = sums + n * static_cast<int64_t>(sizeof(V) / sizeof(float));
            std::memcpy(&y, to, sizeof(V));
            y += levels[0] * minus[n] + levels[1] * plus[n];
            std::memcpy(to, &y, sizeof(V));
        }
    }
}

template <int L>
struct Lanes {
    typedef float type __attribute__((vector_size(4 * L)));
};

// W tokens in vectors of at most L.
#define HALFBIT_CHUNK(name, L, ...)                                                                                      \
    template <int W>                                                                                                     \
    __VA_ARGS__ void name(const Lists &lists, int64_t chunk, const float *x, const float *levels, int64_t step,          \
                          float *sums, int64_t stride) {                                                                 \
        if constexpr (W == 1) chunk_product<float, 1>(lists, chunk, x, levels, step, sums, stride);                      \
        else chunk_product<typename Lanes<(W < L ? W : L)>::type, (W < L ? 1 : W / L)>(lists, chunk, x, levels, step, sums, stride); \
    }

HALFBIT_CHUNK(portable, 4, )
#ifdef HALFBIT_X86
HALFBIT_CHUNK(avx2, 8, [[gnu::target("avx2,fma,bmi2")]])
HALFBIT_CHUNK(avx512, 16, [[gnu::target("avx512f,avx2,fma,bmi2")]])
#endif

// For the narrowest of 1, 4, 16 and 32 tokens that takes them all.
struct Kernel {
    int64_t width;
    Chunk chunk;
};

Kernel fitting(int64_t tokens) {
    const int which = tokens <= 1 ? 0 : tokens <= 4 ? 1 : tokens <= 16 ? 2 : 3;
    constexpr int64_t widths[] = {1, 4, 16, panel_tokens};
#ifdef HALFBIT_X86
    constexpr Chunk wide[] = {avx512<1>, avx512<4>, avx512<16>, avx512<32>};
    constexpr Chunk medium[] = {avx2<1>, avx2<4>, avx2<16>, avx2<32>};
    const Isa isa = active_isa;
    if (isa >= Isa::avx512) return {widths[which], wide[which]};
    if (isa == Isa::avx2) return {widths[which], medium[which]};
#endif
    constexpr Chunk any[] = {portable<1>, portable<4>, portable<16>, portable<32>};
    return {widths[which], any[which]};
}

// Up to 256 tokens of one group, in panels of 32; the last panel may be narrower.
struct Part {
    int64_t first, tokens, lanes;  // lanes: tokens, and zeros in the last panel
    Floats x;

    Part(int64_t first, int64_t tokens, int64_t columns)
        : first(first), tokens(tokens),
          lanes(tokens / panel_tokens * panel_tokens + (tokens % panel_tokens ? fitting(tokens % panel_tokens).width : 0)),
          x(floats((columns + ceil_div(columns, chunk_columns)) * lanes)) {}

    int64_t panels() const { return ceil_div(tokens, panel_tokens); }
    Kernel kernel(int64_t panel) const { return fitting(tokens - panel * panel_tokens); }

    // Where a panel of a chunk of `width` columns begins.
    float *panel_x(int64_t chunk, int64_t width, int64_t panel) const {
        return x.get() + chunk * (chunk_columns + 1) * lanes + (width + 1) * panel * panel_tokens;
    }

    void pack(const float *from, int64_t columns, int64_t panel) const {
        const int64_t width = kernel(panel).width, present = std::min(tokens - panel * panel_tokens, width);
        from += (first + panel * panel_tokens) * columns;
        for (int64_t chunk = 0; chunk * chunk_columns < columns; ++chunk) {
            const int64_t begin = chunk * chunk_columns, count = std::min(chunk_columns, columns - begin);
            float *to = panel_x(chunk, count, panel);
            // 16 columns at a time, so that both sides stay in whole cache lines
            for (int64_t some = 0; some < count; some += 16)
                for (int64_t t = 0; t < width; ++t)
                    for (int64_t c = some; c < std::min(some + 16, count); ++c)
                        to[c * width + t] = t < present ? from[t * columns + begin + c] : 0.0f;
            std::fill_n(to + count * width, width, 0.0f);
        }
    }
};

}  // namespace

Lists::Lists(int64_t rows, int64_t columns)
    : rows(rows), width(columns), chunks(ceil_div(columns, chunk_columns)), found(chunks * rows) {}

const uint32_t *Lists::add(int64_t row, const uint32_t *entry, const uint32_t *end, uint32_t base) {
    // two lists of a chunk are filled up by three each at most
    store.resize(used + (end - entry) + 6 * chunks + 4);
    uint16_t pluses[chunk_columns + 4];
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const auto count = static_cast<uint16_t>(std::min(chunk_columns, width - chunk * chunk_columns));
        const uint32_t begin = base + static_cast<uint32_t>(2 * chunk * chunk_columns), stop = begin + 2 * count;
        uint16_t *const minuses = store.data() + used;
        int64_t minus = 0, plus = 0;
        for (; entry < end && *entry < stop; ++entry) {
            // into both lists, and kept in one: which one is nobody's guess
            const uint32_t e = *entry - begin, sign = e & 1;
            minuses[minus] = pluses[plus] = static_cast<uint16_t>(e >> 1);
            plus += sign, minus += 1 - sign;
        }
        const int64_t of_minus = ceil_div(minus, 4) * 4, of_plus = ceil_div(plus, 4) * 4;
        std::fill(minuses + minus, minuses + of_minus, count), std::fill(pluses + plus, pluses + of_plus, count);
        std::copy_n(pluses, of_plus, minuses + of_minus);
        const auto at = static_cast<uint32_t>(used);
        found[chunk * rows + row] = {at, at + static_cast<uint32_t>(of_minus), at + static_cast<uint32_t>(of_minus + of_plus)};
        used += of_minus + of_plus;
    }
    return entry;
}

void Lists::add(int64_t row, int64_t chunk, const uint8_t *minus, int64_t minuses, const uint8_t *plus, int64_t pluses) {
    // each list is filled up by three at most; sixteen more may be written
    if (store.size() < static_cast<size_t>(used + minuses + pluses + 22)) store.resize(2 * store.size() + 2 * chunk_columns + 22);
    const auto count = static_cast<uint16_t>(std::min(chunk_columns, width - chunk * chunk_columns));
    Place &place = found[chunk * rows + row];
    const auto put = [&](const uint8_t *from, int64_t numbers) {
        uint16_t *to = store.data() + used;
        for (int64_t first = 0; first < numbers; first += 16)
            for (int64_t i = first; i < first + 16; ++i) to[i] = from[i];
        for (int64_t i = 0; i < 3; ++i) to[numbers + i] = count;
        used += ceil_div(numbers, 4) * 4;
    };
    place.minus = static_cast<uint32_t>(used);
    put(minus, minuses);
    place.plus = static_cast<uint32_t>(used);
    put(plus, pluses);
    place.end = static_cast<uint32_t>(used);
}

void product(const Source &source, const std::vector<Group> &groups, const float *x, int64_t columns, const float *levels,
             int64_t step, float *y, int64_t out, int threads) {
    std::vector<std::vector<Part>> parts(groups.size());
    std::vector<std::pair<const Part *, int64_t>> packing;  // of each part its panels
    int64_t work = 0;
    for (size_t g = 0; g < groups.size(); ++g) {
        const int64_t tokens = groups[g].tokens, count = ceil_div(tokens, part_tokens);
        parts[g].reserve(count);
        for (int64_t first = 0; first < tokens; first += part_tokens)
            parts[g].emplace_back(groups[g].first + first, std::min(part_tokens, tokens - first), columns);
        for (const Part &part : parts[g])
            for (int64_t p = 0; p < part.panels(); ++p) packing.emplace_back(&part, p);
        work += tokens * out * columns;
    }
    threads = static_cast<int>(std::clamp<int64_t>(work / tiny_work, 1, std::max(threads, 1)));
    parallel(threads, packing.size(), [&](int64_t i) { packing[i].first->pack(x, columns, packing[i].second); });

    // many rows share a pass over x, but a thread has several turns
    const int64_t share = threads == 1 ? out : static_cast<int64_t>(groups.size()) * out / (4 * threads);
    struct Turn {
        size_t group;
        int64_t first, last;
    };
    std::vector<Turn> turns;
    for (size_t g = 0; g < groups.size(); ++g) {
        const int64_t height = source.height(groups[g].matrix);
        const int64_t rows = ceil_div(std::clamp<int64_t>(share, 64, 256), height) * height;
        for (int64_t first = 0; first < out; first += rows) turns.push_back({g, first, std::min(first + rows, out)});
    }
    parallel(threads, turns.size(), [&](int64_t i) {
        const auto [g, first, last] = turns[i];
        const int64_t rows = last - first;
        Lists lists(rows, columns);
        source.decode(groups[g].matrix, first, last, lists);
        const float *level = levels + (groups[g].matrix * out + first) * step;
        for (const Part &part : parts[g]) {
            // one cache line more: a power of two would put all rows in few places of the cache
            const int64_t stride = part.lanes + (part.lanes > 16 ? 16 : 0);
            const Floats sums = floats(rows * stride);
            std::fill_n(sums.get(), rows * stride, 0.0f);
            for (int64_t chunk = 0; chunk < lists.chunks; ++chunk) {
                const int64_t width = std::min(chunk_columns, columns - chunk * chunk_columns);
                for (int64_t p = 0; p < part.panels(); ++p)
                    part.kernel(p).chunk(lists, chunk, part.panel_x(chunk, width, p), level, step,
                                         sums.get() + p * panel_tokens, stride);
            }
            for (int64_t t = 0; t < part.tokens; t += 16)
                for (int64_t row = 0; row < rows; ++row)
                    for (int64_t k = t; k < std::min(t + 16, part.tokens); ++k)
                        y[(part.first + k) * out + first + row] = sums[row * stride + k];
        }
    });
}

}  // namespace halfbit::ternary
