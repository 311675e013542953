// Quads on a CPU: encode, decode, multiply.
//
// A tile's patterns and signs become one byte per group that is not all zeros, its four columns in two bits each: 0, 1 or 2.
// Bit deposits do eight groups at a time. A block of 256 columns is then one expansion of bytes to their places in a vector
// of 64, whose sixteen words hold sixteen codes each: a shift, a permutation of the levels and a multiply-add take the codes
// of sixteen columns that lie side by side, as x does. That is AVX-512 with VBMI2, for up to 8 tokens, four at a
// time. More go through lists of columns (`ternary.h`), which such CPUs make by compressing a block's columns by masks.
//
// No memory but the operands is touched whatever the bytes say: the number of patterns follows from the masks and is
// compared with where the tile ends, a tile whose signs do not end there raises, and signs are not read behind the tile's.
// x must be finite.

// GCC 12 takes the undefined sources of unmasked AVX-512 intrinsics in its own headers for mistakes.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <nanobind/ndarray.h>

#include "extension.h"
#include "floats.h"
#include "isa.h"
#include "parallel.h"
#include "rotate.h"
#include "tensors.h"
#include "ternary.h"

#ifdef HALFBIT_X86
#include <immintrin.h>
#endif

namespace nb = nanobind;
using namespace nb::literals;
using halfbit::array;
using halfbit::Array;
using halfbit::floats;
using halfbit::Floats;
using halfbit::Isa;

namespace {

constexpr int64_t block_columns = 256, tile_rows = 32, tile_blocks = 8;
constexpr int64_t most_groups = tile_rows * tile_blocks * 64;
constexpr int64_t spare = 320;          // bytes that may be read behind a tile's patterns and signs
constexpr int64_t most_tokens = 4;      // of the kernel with vectors of columns: x of a tile fits the first-level cache
constexpr int64_t few_tokens = 8;       // of a matrix, for which that kernel is taken
constexpr int64_t tiny_work = 1 << 20;  // weights times passes that are worth a thread: some 50 microseconds

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// `tiles.py`.
struct Cut {
    int64_t rows, columns, blocks, bands, segments;

    Cut(int64_t rows, int64_t columns)
        : rows(rows), columns(columns), blocks(ceil_div(columns, block_columns)), bands(ceil_div(rows, tile_rows)),
          segments(ceil_div(blocks, tile_blocks)) {}

    int64_t tiles() const { return bands * segments; }
};

// One tile of a cut.
struct Tile {
    int64_t row, rows, block, blocks;

    Tile(const Cut &cut, int64_t index)
        : row(index / cut.segments * tile_rows), rows(std::min(tile_rows, cut.rows - row)),
          block(index % cut.segments * tile_blocks), blocks(std::min(tile_blocks, cut.blocks - block)) {}
};

// The operands in the order of `Quads.runtime`, but levels and signs of the rotation.
struct Stack {
    const uint64_t *masks;
    const uint8_t *patterns, *signs;
    int64_t pattern_count, sign_count;
    const int64_t *pattern_offsets, *sign_offsets;

    [[noreturn]] static void damaged(int64_t tile) {
        throw std::runtime_error("tile " + std::to_string(tile) + ": patterns or signs do not end as they must");
    }
};

// ------------------------------------------------------------------------------------------------------------------ unpack

// Groups of a tile from patterns and signs, of which 8 bytes beyond `last_sign` can be read; returns how many signs there were.
int64_t unpack_portable(const uint8_t *patterns, int64_t groups, const uint8_t *signs, int64_t last_sign, uint8_t *to) {
    int64_t bit = 0;
    for (int64_t group = 0; group < groups; ++group) {
        uint32_t codes = 0;
        for (uint32_t pattern = patterns[group / 2] >> 4 * (group % 2) & 15; pattern; pattern &= pattern - 1, ++bit) {
            // damaged bytes may want more than there are
            const uint32_t sign = signs[std::min(bit >> 3, last_sign)] >> (bit & 7) & 1;
            codes |= (1 + sign) << 2 * __builtin_ctz(pattern);
        }
        to[group] = static_cast<uint8_t>(codes);
    }
    return bit;
}

[[gnu::always_inline]] inline int64_t population(const Cut &cut, const Tile &tile, const uint64_t *masks) {
    int64_t count = 0;
    for (int64_t row = tile.row; row < tile.row + tile.rows; ++row)
        for (int64_t b = tile.block; b < tile.block + tile.blocks; ++b) count += __builtin_popcountll(masks[row * cut.blocks + b]);
    return count;
}

int64_t population_portable(const Cut &cut, const Tile &tile, const uint64_t *masks) { return population(cut, tile, masks); }

#ifdef HALFBIT_X86
HALFBIT_TARGET("avx2,bmi,bmi2,popcnt")
int64_t population_fast(const Cut &cut, const Tile &tile, const uint64_t *masks) { return population(cut, tile, masks); }

// On the way through the groups of a tile, eight at a time.
struct Unpacking {
    const uint8_t *patterns, *signs;
    int64_t groups, sign_bytes;
    uint8_t *to;
    int64_t number;  // of the tile
    uint64_t done = 0, bit = 0;  // groups / 8; signs

    [[gnu::always_inline]] inline void put(uint32_t eight) {
        uint64_t some;
        std::memcpy(&some, signs + (bit >> 3), 8);
        const uint64_t ones = _pdep_u64(eight, 0x5555555555555555);
        const uint64_t codes = ones + _pdep_u64(some >> (bit & 7), ones);
        std::memcpy(to + 8 * done, &codes, 8);
        bit += static_cast<uint32_t>(__builtin_popcount(eight));
        ++done;
    }
    [[gnu::always_inline]] inline bool whole() const { return done < static_cast<uint64_t>(groups) / 8; }
    [[gnu::always_inline]] inline void next() {
        uint32_t eight;
        std::memcpy(&eight, patterns + 4 * done, 4);
        put(eight);
    }
    // Damaged patterns may want more signs than there are. So this must come at least once in eight blocks of columns.
    void upto(int64_t wanted) {
        while (bit <= 8 * static_cast<uint64_t>(sign_bytes) && static_cast<int64_t>(8 * done) < wanted) {
            if (whole()) {
                next();
                continue;
            }
            uint32_t eight;
            std::memcpy(&eight, patterns + 4 * done, 4);
            put(eight & ((uint32_t{1} << 4 * (groups % 8)) - 1));
        }
        if (bit > 8 * static_cast<uint64_t>(sign_bytes)) Stack::damaged(number);
    }
};

HALFBIT_TARGET_END
#else
constexpr auto population_fast = population_portable;
#endif

// Bytes of the groups of one tile, in their order; 64 bytes behind the last may be read.
struct Groups {
    alignas(64) uint8_t bytes[most_groups + 64];

    int64_t count;         // groups
    int64_t weights;       // that are not zero
    const uint8_t *patterns, *signs;  // what they are made of
    int64_t sign_bytes;
    int64_t number;  // of the tile

    // `masks` are those of the matrix, `number` counts the tiles of all matrices.
    void unpack(const Stack &from, const Cut &cut, const Tile &tile, const uint64_t *masks, int64_t number) {
        open(from, cut, tile, masks, number);
#ifdef HALFBIT_X86
        if (halfbit::active_isa >= Isa::avx2) {
            Unpacking unpacking{patterns, signs, count, sign_bytes, bytes, number};
            unpacking.upto(count);
            return close(static_cast<int64_t>(unpacking.bit));
        }
#endif
        close(unpack_portable(patterns, count, signs, sign_bytes, bytes));
    }

    // What comes before the groups are unpacked, and, told how many signs they took, behind it.
    void open(const Stack &from, const Cut &cut, const Tile &tile, const uint64_t *masks, int64_t index) {
        number = index;
        const bool fast = halfbit::active_isa >= Isa::avx2;
        const int64_t begin = from.pattern_offsets[number], end = from.pattern_offsets[number + 1];
        const int64_t first = from.sign_offsets[number], last = from.sign_offsets[number + 1];
        count = (fast ? population_fast : population_portable)(cut, tile, masks);
        if (begin < 0 || end - begin != ceil_div(count, 2) || end > from.pattern_count || first < 0 || first > last ||
            last > from.sign_count || last - first > most_groups / 2)
            Stack::damaged(number);
        patterns = from.patterns + begin, signs = from.signs + first;
        // room behind the ends of the tensors
        if (end + spare > from.pattern_count) std::memcpy(copies[0], patterns, end - begin), patterns = copies[0];
        if (last + spare > from.sign_count) std::memcpy(copies[1], signs, last - first), signs = copies[1];
        sign_bytes = last - first;
    }
    void close(int64_t signs_taken) {
        weights = signs_taken;
        if (ceil_div(weights, 8) != sign_bytes) Stack::damaged(number);
    }

    // What a product need not know: no group is all zeros, and no bits are set behind the last pattern and sign.
    bool whole() const {
        return std::find(bytes, bytes + count, 0) == bytes + count && !(count % 2 && patterns[count / 2] >> 4) &&
               !(weights % 8 && signs[weights / 8] >> weights % 8);
    }

private:
    uint8_t copies[2][most_groups / 2 + spare];
};

// Of each byte of a group the weights that are not zero: 2 * column + (code 2: 1), columns counted from the group's first.
struct Weights {
    alignas(64) uint32_t entries[256][4];
    uint8_t count[256];

    Weights() : entries{}, count{} {
        for (int byte = 0; byte < 256; ++byte)
            for (int f = 0; f < 4; ++f)
                if (const uint32_t code = byte >> 2 * f & 3) entries[byte][count[byte]++] = 2 * 16 * f + (code == 2);
    }
};
const Weights weights_of;

// The weights of one block that are not zero, counted from `base`, to `to`, of which three more may be written.
inline uint32_t *block_weights(uint64_t mask, const uint8_t *&group, uint32_t base, uint32_t *to) {
    for (; mask; mask &= mask - 1, ++group) {
        const int at = __builtin_ctzll(mask);
        const uint32_t column = base + 2 * static_cast<uint32_t>(64 * (at & 3) + (at >> 2));
        for (int k = 0; k < 4; ++k) to[k] = column + weights_of.entries[*group][k];
        to += weights_of.count[*group];
    }
    return to;
}

// Columns of one block, of code 1 and of code 2, to lists that have room for a vector more.
struct Columns {
    uint8_t minus[block_columns + 64], plus[block_columns + 64];
    int64_t minuses, pluses;
};

// Of the first `count` columns of a block. Damaged patterns may name others, which are left out.
using List = void (*)(uint64_t mask, const uint8_t *group, int64_t count, Columns &to);

#ifdef HALFBIT_X86
HALFBIT_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx2,fma,bmi,bmi2,popcnt")

void list_block(uint64_t mask, const uint8_t *group, int64_t count, Columns &to) {
    const __m512i codes = _mm512_maskz_expand_epi8(mask, _mm512_loadu_si512(group));
    // group i has the columns 64 (i % 4) + i / 4 + 16 f
    const __m512i in_order = _mm512_set_epi8(
        63, 62, 61, 60, 59, 58, 57, 56, 55, 54, 53, 52, 51, 50, 49, 48, 47, 46, 45, 44, 43, 42, 41, 40, 39, 38, 37, 36, 35, 34, 33, 32,
        31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i fours = _mm512_and_si512(_mm512_srli_epi16(in_order, 2), _mm512_set1_epi8(15));
    const __m512i first = _mm512_add_epi8(_mm512_slli_epi16(_mm512_and_si512(in_order, _mm512_set1_epi8(3)), 6), fours);
    int64_t minuses = 0, pluses = 0;
    for (int f = 0; f < 4; ++f) {
        const __m512i columns = _mm512_add_epi8(first, _mm512_set1_epi8(static_cast<char>(16 * f)));
        const __mmask64 there = count >= block_columns
            ? ~__mmask64{0} : _mm512_cmplt_epu8_mask(columns, _mm512_set1_epi8(static_cast<char>(count)));
        const __mmask64 minus = _mm512_mask_test_epi8_mask(there, codes, _mm512_set1_epi8(static_cast<char>(1 << 2 * f)));
        const __mmask64 plus = _mm512_mask_test_epi8_mask(there, codes, _mm512_set1_epi8(static_cast<char>(2 << 2 * f)));
        _mm512_storeu_si512(to.minus + minuses, _mm512_maskz_compress_epi8(minus, columns));
        _mm512_storeu_si512(to.plus + pluses, _mm512_maskz_compress_epi8(plus, columns));
        minuses += __builtin_popcountll(minus), pluses += __builtin_popcountll(plus);
    }
    to.minuses = minuses, to.pluses = pluses;
}
HALFBIT_TARGET_END
#endif

// Null where the CPU has no such instructions.
List list_of() {
#ifdef HALFBIT_X86
    static const bool compresses = __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vbmi") &&
                                   __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                                   __builtin_cpu_supports("avx512vl");
    if (halfbit::active_isa >= Isa::avx512 && compresses) return list_block;
#endif
    return nullptr;
}

// ------------------------------------------------------------------------------------------------------------ one to four

// One tile times T tokens: x [T, stride], 64-byte aligned, of the tile's columns; levels [rows, 2]; added to sums [rows, T].
using Multiply = void (*)(const Cut &, const Tile &, const uint64_t *masks, Groups &groups, const float *x, int64_t stride,
                          const float *levels, float *sums);

#ifdef HALFBIT_X86
HALFBIT_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx2,fma,bmi,bmi2,popcnt")

// Sixteen columns: a shift by 2 I brings their codes to where the permutation looks.
template <int T, int Chains, int I>
[[gnu::always_inline]] inline void sixteen(__m512i codes, __m512 table, const float *x, int64_t stride,
                                           __m512 (&sum)[T][Chains]) {
    const __m512 w = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 2 * I), table);
    for (int t = 0; t < T; ++t)
        sum[t][I % Chains] = _mm512_fmadd_ps(w, _mm512_load_ps(x + t * stride + 16 * I), sum[t][I % Chains]);
}

template <int T, int Chains, int... I>
[[gnu::always_inline]] inline void one_block(__m512i codes, __m512 table, const float *x, int64_t stride,
                                             __m512 (&sum)[T][Chains], std::integer_sequence<int, I...>) {
    (sixteen<T, Chains, I>(codes, table, x, stride, sum), ...);
}

// Groups are unpacked a row or more before they are multiplied, which other parts of the core do.
template <int T>
void tile_product(const Cut &cut, const Tile &tile, const uint64_t *masks, Groups &groups, const float *x, int64_t stride,
                  const float *levels, float *sums) {
    // several sums for few tokens, so that one multiply-add need not wait for the last
    constexpr int chains = T == 1 ? 4 : 2;
    Unpacking unpacking{groups.patterns, groups.signs, groups.count, groups.sign_bytes, groups.bytes, groups.number};
    const uint8_t *group = groups.bytes;
    const int64_t each = ceil_div(groups.count, 8 * tile.rows * tile.blocks);  // times eight for a block
    for (int64_t row = 0; row < tile.rows; ++row) {
        const uint64_t *mask = masks + (tile.row + row) * cut.blocks + tile.block;
        // by the two lowest bits of an index: 0, the levels, nothing
        __m512 table = _mm512_maskz_mov_ps(0x2222, _mm512_set1_ps(levels[2 * row]));
        table = _mm512_mask_mov_ps(table, 0x4444, _mm512_set1_ps(levels[2 * row + 1]));
        __m512 sum[T][chains];
        for (int t = 0; t < T; ++t)
            for (int k = 0; k < chains; ++k) sum[t][k] = _mm512_setzero_ps();
        __builtin_prefetch(mask + tile_rows * cut.blocks);
        int64_t of_row = 0;
        for (int64_t b = 0; b < tile.blocks; ++b) of_row += __builtin_popcountll(mask[b]);
        unpacking.upto(group - groups.bytes + of_row);
        __builtin_prefetch(unpacking.patterns + 4 * unpacking.done + 1024);
        __builtin_prefetch(unpacking.signs + unpacking.bit / 8 + 512);
        for (int64_t b = 0; b < tile.blocks; ++b) {
            for (int64_t i = 0; i < each && unpacking.whole(); ++i) unpacking.next();
            const __m512i codes = _mm512_maskz_expand_epi8(mask[b], _mm512_loadu_si512(group));
            group += __builtin_popcountll(mask[b]);
            one_block<T, chains>(codes, table, x + block_columns * b, stride, sum, std::make_integer_sequence<int, 16>());
        }
        for (int t = 0; t < T; ++t) {
            for (int k = 1; k < chains; ++k) sum[t][0] = _mm512_add_ps(sum[t][0], sum[t][k]);
            sums[row * T + t] += _mm512_reduce_add_ps(sum[t][0]);
        }
    }
    groups.close(static_cast<int64_t>(unpacking.bit));
}
HALFBIT_TARGET_END

// For 1, 2 and 4 tokens; null where the CPU has no such instructions.
Multiply multiply_of(int64_t tokens) {
    static const bool expands = __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vbmi") &&
                                __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                                __builtin_cpu_supports("avx512vl");
    if (halfbit::active_isa < Isa::avx512 || !expands) return nullptr;
    return tokens == 1 ? tile_product<1> : tokens == 2 ? tile_product<2> : tile_product<4>;
}
#else
Multiply multiply_of(int64_t) { return nullptr; }
#endif

// Tokens that go through a matrix together.
struct Pass {
    int64_t matrix, first, tokens, lanes;
    Floats x;  // [lanes, stride], zeros behind the last column and token
};

// One cache line more than the columns take, so that tokens do not share places of the cache.
int64_t stride_of(const Cut &cut) { return cut.blocks * block_columns + 16; }

void few(const Stack &from, const Cut &cut, std::vector<Pass> &passes, const float *x, const float *levels, float *y,
         int threads) {
    const int64_t stride = stride_of(cut), out = cut.rows;
    const int64_t work = static_cast<int64_t>(passes.size()) * out * cut.columns;
    threads = static_cast<int>(std::clamp<int64_t>(work / tiny_work, 1, std::max(threads, 1)));
    for (Pass &pass : passes) {
        pass.x = floats(pass.lanes * stride);
        std::fill_n(pass.x.get(), pass.lanes * stride, 0.0f);
        for (int64_t t = 0; t < pass.tokens; ++t)
            std::copy_n(x + (pass.first + t) * cut.columns, cut.columns, pass.x.get() + t * stride);
    }
    halfbit::parallel(threads, static_cast<int64_t>(passes.size()) * cut.bands, [&](int64_t item) {
        const Pass &pass = passes[item / cut.bands];
        const int64_t band = item % cut.bands, top = band * tile_rows;
        const Multiply multiply = multiply_of(pass.lanes);
        const uint64_t *masks = from.masks + pass.matrix * out * cut.blocks;
        float sums[tile_rows * most_tokens] = {};
        Groups groups;
        for (int64_t segment = 0; segment < cut.segments; ++segment) {
            const Tile tile(cut, band * cut.segments + segment);
            groups.open(from, cut, tile, masks, pass.matrix * cut.tiles() + band * cut.segments + segment);
            multiply(cut, tile, masks, groups, pass.x.get() + tile.block * block_columns, stride,
                     levels + 2 * (pass.matrix * out + top), sums);
        }
        const int64_t height = std::min(tile_rows, out - top);
        for (int64_t t = 0; t < pass.tokens; ++t)
            for (int64_t row = 0; row < height; ++row) y[(pass.first + t) * out + top + row] = sums[row * pass.lanes + t];
    });
}

// -------------------------------------------------------------------------------------------------------- lists of columns

class Rows final : public halfbit::ternary::Source {
public:
    Rows(const Stack &from, const Cut &cut) : from(from), cut(cut) {}

    int64_t height(int64_t) const override { return tile_rows; }

    void decode(int64_t matrix, int64_t first, int64_t last, halfbit::ternary::Lists &lists) const override {
        if (const List list = list_of()) return blocks_to(list, matrix, first, last, lists);
        const uint64_t *masks = from.masks + matrix * cut.rows * cut.blocks;
        // of each row of a band; a cache line more, or all rows would share a few places of the cache
        const int64_t stride = cut.columns + 4 + 16;
        std::vector<uint32_t> entries(tile_rows * stride);
        uint32_t *end[tile_rows];
        Groups groups;
        for (int64_t top = first; top < last; top += tile_rows) {
            const int64_t band = top / tile_rows, height = std::min(tile_rows, last - top);
            for (int64_t row = 0; row < height; ++row) end[row] = entries.data() + row * stride;
            for (int64_t segment = 0; segment < cut.segments; ++segment) {
                const int64_t index = band * cut.segments + segment;
                const Tile tile(cut, index);
                groups.unpack(from, cut, tile, masks, matrix * cut.tiles() + index);
                const uint8_t *group = groups.bytes;
                for (int64_t row = 0; row < height; ++row)
                    for (int64_t b = tile.block; b < tile.block + tile.blocks; ++b) {
                        const uint32_t base = static_cast<uint32_t>(2 * block_columns * b);
                        if ((b + 1) * block_columns <= cut.columns) {
                            end[row] = block_weights(masks[(top + row) * cut.blocks + b], group, base, end[row]);
                            continue;
                        }
                        // damaged patterns may name columns behind the last
                        uint32_t some[block_columns + 4];
                        const uint32_t *stop = block_weights(masks[(top + row) * cut.blocks + b], group, base, some);
                        end[row] = std::copy_if(static_cast<const uint32_t *>(some), stop, end[row],
                                                [&](uint32_t e) { return e < 2 * cut.columns; });
                    }
            }
            for (int64_t row = 0; row < height; ++row)
                lists.add(top + row - first, entries.data() + row * stride, end[row]);
        }
    }

private:
    void blocks_to(List list, int64_t matrix, int64_t first, int64_t last, halfbit::ternary::Lists &lists) const {
        static_assert(block_columns == halfbit::ternary::chunk_columns);
        const uint64_t *masks = from.masks + matrix * cut.rows * cut.blocks;
        const auto groups = std::make_unique<Groups>();
        Columns found;
        for (int64_t index = first / tile_rows * cut.segments; index < ceil_div(last, tile_rows) * cut.segments; ++index) {
            const Tile tile(cut, index);
            groups->unpack(from, cut, tile, masks, matrix * cut.tiles() + index);
            const uint8_t *group = groups->bytes;
            for (int64_t row = tile.row; row < tile.row + tile.rows; ++row)
                for (int64_t b = tile.block; b < tile.block + tile.blocks; ++b) {
                    const uint64_t mask = masks[row * cut.blocks + b];
                    list(mask, group, cut.columns - block_columns * b, found);
                    group += __builtin_popcountll(mask);
                    lists.add(row - first, b, found.minus, found.minuses, found.plus, found.pluses);
                }
        }
    }

    const Stack &from;
    const Cut &cut;
};

// ------------------------------------------------------------------------------------------------------- encode and decode

template <class T>
nb::ndarray<nb::numpy, T, nb::ndim<1>> owned(std::vector<T> &&values) {
    auto *vector = new std::vector<T>(std::move(values));
    nb::capsule owner(vector, [](void *p) noexcept { delete static_cast<std::vector<T> *>(p); });
    return nb::ndarray<nb::numpy, T, nb::ndim<1>>(vector->data(), {vector->size()}, owner);
}

struct Encoded {
    std::vector<uint8_t> patterns, signs;
    int64_t groups = 0, weights = 0;

    void add(uint32_t pattern, uint32_t sign) {
        if (groups++ % 2) patterns.back() |= pattern << 4;
        else patterns.push_back(static_cast<uint8_t>(pattern));
        for (; pattern; pattern &= pattern - 1, ++weights) {
            if (weights % 8 == 0) signs.push_back(0);
            signs.back() |= (sign >> __builtin_ctz(pattern) & 1) << weights % 8;
        }
    }
};

nb::tuple encode(Array<const uint8_t, 2> codes, int threads) {
    const Cut cut(codes.shape(0), codes.shape(1));
    std::vector<int64_t> masks(cut.rows * cut.blocks);
    std::vector<uint8_t> patterns, signs;
    std::vector<int32_t> tile_signs(cut.tiles());
    {
        const nb::gil_scoped_release release;
        std::vector<Encoded> parts(cut.tiles());
        halfbit::parallel(threads, cut.tiles(), [&](int64_t index) {
            const Tile tile(cut, index);
            for (int64_t row = tile.row; row < tile.row + tile.rows; ++row)
                for (int64_t b = tile.block; b < tile.block + tile.blocks; ++b) {
                    uint8_t block[block_columns] = {};
                    std::memcpy(block, codes.data() + row * cut.columns + block_columns * b,
                                std::min(block_columns, cut.columns - block_columns * b));
                    uint64_t mask = 0;
                    for (int group = 0; group < 64; ++group) {
                        uint32_t pattern = 0, sign = 0;
                        for (int f = 0; f < 4; ++f) {
                            const uint32_t code = block[64 * (group & 3) + 16 * f + (group >> 2)];
                            if (code > 2) throw std::invalid_argument("codes must be 0, 1 or 2, got " + std::to_string(code));
                            pattern |= (code != 0) << f, sign |= (code == 2) << f;
                        }
                        if (!pattern) continue;
                        mask |= uint64_t{1} << group;
                        parts[index].add(pattern, sign);
                    }
                    masks[row * cut.blocks + b] = static_cast<int64_t>(mask);
                }
            tile_signs[index] = static_cast<int32_t>(parts[index].weights);
        });
        for (const Encoded &part : parts) {
            patterns.insert(patterns.end(), part.patterns.begin(), part.patterns.end());
            signs.insert(signs.end(), part.signs.begin(), part.signs.end());
        }
    }
    return nb::make_tuple(owned(std::move(masks)), owned(std::move(patterns)), owned(std::move(signs)),
                          owned(std::move(tile_signs)));
}

// `matrices` matrices of `rows` rows.
Stack stack(const nb::list &t, int64_t matrices, const Cut &cut) {
    const auto masks = array<const uint64_t, 3>(t[0]);
    const auto patterns = array<const uint8_t, 1>(t[1]), signs = array<const uint8_t, 1>(t[2]);
    const auto pattern_offsets = array<const int64_t, 1>(t[3]), sign_offsets = array<const int64_t, 1>(t[4]);
    const int64_t tiles = matrices * cut.tiles();
    if (masks.shape(0) != matrices || masks.shape(1) != cut.rows || masks.shape(2) != cut.blocks ||
        pattern_offsets.shape(0) != tiles + 1 || sign_offsets.shape(0) != tiles + 1)
        throw std::invalid_argument("masks and offsets do not fit the matrices");
    return {masks.data(), patterns.data(), signs.data(), patterns.shape(0), signs.shape(0), pattern_offsets.data(),
            sign_offsets.data()};
}

void decode(const Stack &from, const Cut &cut, uint8_t *codes, int threads) {
    halfbit::parallel(threads, cut.tiles(), [&](int64_t index) {
        const Tile tile(cut, index);
        Groups groups;
        groups.unpack(from, cut, tile, from.masks, index);
        const uint8_t *group = groups.bytes;
        for (int64_t row = tile.row; row < tile.row + tile.rows; ++row)
            for (int64_t b = tile.block; b < tile.block + tile.blocks; ++b) {
                uint32_t entries[block_columns + 4];
                const uint32_t *end = block_weights(from.masks[row * cut.blocks + b], group, 0, entries);
                uint8_t *to = codes + row * cut.columns + b * block_columns;
                const int64_t count = std::min(block_columns, cut.columns - b * block_columns);
                std::fill_n(to, count, uint8_t{0});
                for (const uint32_t *e = entries; e < end; ++e) {
                    if (*e / 2 >= count) Stack::damaged(index);
                    to[*e / 2] = static_cast<uint8_t>(1 + *e % 2);
                }
            }
        if (!groups.whole()) Stack::damaged(index);
    });
}

// ----------------------------------------------------------------------------------------------------------------- product

void product(Array<const float, 2> x, Array<const int64_t, 1> starts, const Stack &from, const Cut &cut,
             Array<const float, 2> levels, Array<const int8_t, 1> signs, Array<float, 2> y, int threads) {
    const int64_t tokens = x.shape(0), columns = cut.columns, out = cut.rows, groups = starts.shape(0) - 1;
    const int64_t *start = starts.data();
    if (start[0] != 0 || start[groups] != tokens || !std::is_sorted(start, start + groups + 1))
        throw std::invalid_argument("starts must rise from 0 to the number of tokens, one group for each matrix");
    if (y.shape(0) != tokens || levels.shape(0) != groups * out || levels.shape(1) != 2 ||
        (signs.shape(0) && signs.shape(0) != columns))
        throw std::invalid_argument("x, y and levels do not fit together");
    if (!columns) return void(std::fill_n(y.data(), tokens * out, 0.0f));
    const float *given = x.data();
    Floats rotated;
    if (signs.shape(0)) {
        rotated = floats(tokens * columns);
        given = rotated.get();
        halfbit::parallel(threads, tokens, [&](int64_t t) {
            halfbit::rotate(x.data() + t * columns, signs.data(), columns, rotated.get() + t * columns);
        });
    }
    std::vector<Pass> passes;
    std::vector<halfbit::ternary::Group> many;
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t count = start[g + 1] - start[g];
        if (!count) continue;
        if (count > few_tokens || !multiply_of(1)) {
            many.push_back({g, start[g], count});
            continue;
        }
        for (int64_t first = 0; first < count; first += most_tokens) {
            const int64_t taken = std::min(count - first, most_tokens);
            passes.push_back({g, start[g] + first, taken, taken <= 2 ? taken : most_tokens, nullptr});
        }
    }
    if (!passes.empty()) few(from, cut, passes, given, levels.data(), y.data(), threads);
    if (!many.empty())
        halfbit::ternary::product(Rows(from, cut), many, given, columns, levels.data(), 2, y.data(), out, threads);
}

}  // namespace

HALFBIT_BINDINGS(quads) {
    m.def("quads_encode", [](nb::handle codes, int threads) { return encode(array<const uint8_t, 2>(codes), threads); },
          "codes"_a, "threads"_a,
          "codes uint8 [rows, columns] -> masks int64 [rows * blocks], patterns uint8 [n], signs uint8 [m], signs of each "
          "tile int32 [tiles]");
    m.def("quads_decode", [](nb::list t, nb::handle codes, int threads) {
        const auto to = array<uint8_t, 2>(codes);
        const Cut cut(to.shape(0), to.shape(1));
        const Stack from = stack(t, 1, cut);
        const nb::gil_scoped_release release;
        decode(from, cut, to.data(), threads);
    }, "tensors"_a, "codes"_a, "threads"_a,
          "One matrix: masks, patterns, signs and their offsets -> into codes uint8 [rows, columns]");
    m.def("quads_product", [](nb::handle x, nb::handle starts, nb::list t, nb::handle y, int threads) {
        const auto inputs = array<const float, 2>(x);
        const auto begins = array<const int64_t, 1>(starts);
        const auto outputs = array<float, 2>(y);
        const Cut cut(outputs.shape(1), inputs.shape(1));
        const Stack from = stack(t, begins.shape(0) - 1, cut);
        const auto levels = array<const float, 2>(t[5]);
        const auto signs = array<const int8_t, 1>(t[6]);
        const nb::gil_scoped_release release;
        product(inputs, begins, from, cut, levels, signs, outputs, threads);
    }, "x"_a, "starts"_a, "tensors"_a, "y"_a, "threads"_a,
          "x float32 [tokens, columns] times the matrix of each group -> into y float32 [tokens, out]; tensors: what "
          "`Quads.runtime` gives");
}
