// SpQR and `grouped` on a CPU: multiply straight from the codes, and decode some rows at a time for products with many tokens.
//
// SpQR's layout is drawn in README.md: tiles of 16 rows, blocks of 32 columns, so that a vector of 16 lanes reads one word of
// each row of a tile. `grouped` lies row by row; its words are transposed into tiles on their way to the registers.
// `lanes.h` has the vectors, `tile.h` what is done with one tile; both are included here once for each kind of instructions,
// and one is chosen at run time. `digits.h` has one token in whole numbers, for CPUs that can do it.
//
// Nothing outside of the operands is read whatever the bytes say: sizes are compared with the shapes before the work
// starts, x is padded as far as an outlier's column can reach, and offsets and orders are looked at before they are used.

// GCC 12 takes the undefined sources of unmasked AVX-512 intrinsics in its own headers for mistakes.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>

#include "extension.h"
#include "floats.h"
#include "isa.h"
#include "parallel.h"
#include "tensors.h"

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

// ------------------------------------------------------------------------------------------------------- 16-bit numbers

inline float of_bits(uint32_t bits) {
    float a;
    std::memcpy(&a, &bits, 4);
    return a;
}

inline uint32_t bits_of(float a) {
    uint32_t bits;
    std::memcpy(&bits, &a, 4);
    return bits;
}

inline float float_of(uint16_t a, bool bfloat) {
    if (bfloat) return of_bits(uint32_t{a} << 16);
    const uint32_t sign = uint32_t{a} >> 15 << 31, rest = a & 0x7FFF;
    if (rest >= 0x7C00) return of_bits(sign | 0x7F800000 | rest << 13);
    // exponents 15 and 127 are 0; the product is exact, also where the result or the number itself is subnormal
    return of_bits(sign | bits_of(of_bits(rest << 13) * 0x1p112f));
}

// To nearest, ties to even.
inline uint16_t half_of(float a) {
    const uint32_t sign = bits_of(a) >> 31 << 15;
    const float size = of_bits(bits_of(a) & 0x7FFFFFFF);
    if (size >= 65520.0f) return static_cast<uint16_t>(sign | 0x7C00);
    if (size < 0x1p-14f) {
        // multiples of 2^-24: adding 0.5 leaves them in the lowest bits, rounded
        return static_cast<uint16_t>(sign | (bits_of(size + 0.5f) - bits_of(0.5f)));
    }
    const uint32_t bits = bits_of(size);
    return static_cast<uint16_t>(sign | (bits + 0xFFF + (bits >> 13 & 1) - (112u << 23)) >> 13);
}

inline uint16_t bfloat_of(float a) {
    const uint32_t bits = bits_of(a);
    return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// --------------------------------------------------------------------------------------------------------------- operands

// A matrix of fields, in one of two layouts:
//   tiled: `words` and, in place of its ragged edge, whole tiles and blocks, `edge` (`tiled.edge`)
//   row by row: a row is a string of bits in `stride` bytes from `first` on, as `bits.py` packs them
struct Fields {
    const uint32_t *words, *edge;
    int64_t rows, columns;
    int bits;
    const uint8_t *first, *end;  // null: tiled; `end`: of what can be read, which other rows and matrices may be, too
    int64_t stride;

    int64_t whole() const { return columns / 32; }
    int64_t blocks() const { return (columns + 31) / 32; }
    int64_t tiles() const { return (rows + 15) / 16; }
    int64_t word_count() const { return rows * whole() * bits + (rows * (columns % 32) * bits + 31) / 32; }
    int64_t edge_count() const {
        return 16 * bits * ((columns % 32 ? tiles() : 0) + (rows % 16 ? whole() : 0));
    }

    const uint32_t *block(int64_t tile, int64_t block) const {
        if (block >= whole()) return edge + 16 * bits * tile;
        if (16 * tile + 16 > rows) return edge + 16 * bits * ((columns % 32 ? tiles() : 0) + block);
        return words + 16 * bits * (tile * whole() + block);
    }
};

// The weights of one block, [32, 16], from its words and the statistics of its groups, [groups, 16].
using Fill = void (*)(const uint32_t *words, const float *scale, const float *zero, float *weights);

// One matrix of a stack.
struct Matrix {
    Fields codes, scales, zeros;
    const uint16_t *second;  // [supergroups, groups, per_group]; per_group 0: scales and zeros are what is stored
    int64_t rows, group, groups, supergroup, per_group;
    bool bfloat, half;
    bool symmetric;  // every zero is the middle code, and none is stored
    bool has_outliers;
    const int64_t *outlier_offsets;  // [tiles, chunks] and the end
    int64_t chunks, outlier_count;
    const uint8_t *outlier_columns, *outlier_rows;  // of all matrices
    const uint16_t *outlier_values;
    Fill fill;

    int64_t outlier_begin(int64_t tile, int64_t chunk) const { return outlier_offsets[tile * chunks + chunk]; }
    int64_t outlier_row(int64_t at) const { return outlier_rows[at / 2] >> 4 * (at % 2) & 15; }

    // Where the blocks of 32 groups end: 32 groups are `group` blocks.
    int64_t stretch_end(int64_t stretch) const {
        return group >= codes.columns ? codes.blocks() : std::min(codes.blocks(), (stretch + 1) * group);
    }
};

// Columns that are decoded before they meet all tokens, where there are many.
constexpr int64_t many_columns = 128;

using Many = void (*)(const Matrix &, int64_t tile, const float *x, float *y);

// A token in whole numbers: x = unit * (65536 high + 256 middle + low), one unit for each segment of columns, whose words
// are: the sum of the whole numbers times minus the middle code; the unit; the sum of x (both float32); then, of each four
// columns, the high, middle and low digits, four bytes each.
constexpr int64_t digit_words(int64_t segment) { return 3 + 3 * segment / 4; }

// What one kind of instructions offers: products with one token and weights of a block, both null for forms that they are
// not made for; products with several tokens, by rising number; the weights of some blocks of a tile into [columns, step].
struct Kernels {
    Fill fill;
    void (*one)(const Matrix &, int64_t tile, const float *x, const float *sums, float *y);
    // The same in whole numbers, null where it is not made for the form or the CPU: `to_digits` says whether x can be taken.
    bool (*to_digits)(const float *x, const float *sums, int64_t width, int64_t segment, int32_t center, int32_t *to);
    void (*digits)(const Matrix &, int64_t tile, const float *x, const int32_t *digits, float *y);
    std::vector<std::pair<int64_t, Many>> many;
    // Tiles `first` to `last`, `abreast` at a time, with panels of at most `most_tokens` tokens:
    // x [width / many_columns, panels, many_columns, tokens], y [tiles / abreast, panels, tokens, abreast, 16], to which it
    // adds; null: not made for these instructions.
    int64_t most_tokens, abreast;
    void (*rows)(const Matrix &, int64_t first, int64_t last, const float *x, int64_t panels, int64_t tokens, float *y);
    void (*decode)(const Matrix &, int64_t tile, int64_t first, int64_t last, void *to, int64_t step, int type);
};

namespace portable {
#define HALFBIT_LANES 0
#include "lanes.h"
#include "tile.h"
#undef HALFBIT_LANES
}  // namespace portable

#ifdef HALFBIT_X86
// every CPU with AVX2 has F16C
HALFBIT_TARGET("avx2,fma,f16c")
namespace avx2 {
#define HALFBIT_LANES 256
#include "lanes.h"
#include "tile.h"
#undef HALFBIT_LANES
}  // namespace avx2
HALFBIT_TARGET_END

HALFBIT_TARGET("avx512f,avx2,fma,f16c")
namespace avx512 {
#define HALFBIT_LANES 512
#include "lanes.h"
#include "tile.h"
#undef HALFBIT_LANES
}  // namespace avx512
HALFBIT_TARGET_END

HALFBIT_TARGET("avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi,avx512vbmi2,avx2,fma,f16c")
namespace avx512vnni {
#include "digits.h"
}  // namespace avx512vnni
HALFBIT_TARGET_END
#endif

Kernels kernels(Isa isa, int bits, int64_t segment) {
#ifdef HALFBIT_X86
    if (isa == Isa::avx512vnni) return avx512vnni::kernels(bits, segment);
    if (isa == Isa::avx512) return avx512::kernels(bits, segment);
    if (isa == Isa::avx2) return avx2::kernels(bits, segment);
#endif
    static_cast<void>(isa);
    return portable::kernels(bits, segment);
}

using Words = Array<const uint32_t, 2>;

// Columns of x as the kernels take it: as far as an outlier's column can reach.
int64_t padded(int64_t columns) { return (columns + 255) / 256 * 256; }

// Columns of a block that share statistics, where the kernels are made for that, else 0.
int64_t segment_of(int64_t group, int64_t columns) {
    return group == 8 || group == 16 ? group : group % 32 == 0 || group >= columns ? 32 : 0;
}

// The fields of `reference.Operands` and `reference.Form`.
struct Stack {
    Words codes, codes_edge, scales, scales_edge, zeros, zeros_edge;
    Array<const uint16_t, 4> second;
    Array<const int64_t, 1> offsets;
    Array<const uint8_t, 1> columns, rows;
    Array<const uint16_t, 1> values;
    Array<const int64_t, 2> order;
    int64_t out, in;
    std::array<int64_t, 6> form;
    bool bfloat;

    int bits() const { return static_cast<int>(form[0]); }
    int64_t count() const { return static_cast<int64_t>(codes.shape(0)); }
    int64_t segment() const { return form[5] ? 0 : segment_of(form[1], in); }

    Matrix matrix(int64_t number, Fill fill = nullptr) const {
        const auto [bits, group, scale_bits, zero_bits, supergroup, half] = form;
        Matrix m{};
        m.rows = out, m.fill = fill;
        m.group = group ? group : std::numeric_limits<int64_t>::max() / 64;
        m.groups = group ? std::max<int64_t>(1, (in + group - 1) / group) : 1;
        m.codes = tiled(codes, codes_edge, number, in, bits);
        m.scales = tiled(scales, scales_edge, number, m.groups, scale_bits);
        m.zeros = tiled(zeros, zeros_edge, number, m.groups, zero_bits);
        m.supergroup = supergroup;
        m.per_group = 2 * ((scale_bits != 16) + (zero_bits != 16));
        m.second = second.data() + number * static_cast<int64_t>(second.shape(1)) * m.groups * m.per_group;
        m.bfloat = bfloat, m.half = half;
        m.chunks = (in + 255) / 256;
        m.has_outliers = offsets.shape(0) > 1;
        m.outlier_offsets = offsets.data() + number * m.codes.tiles() * m.chunks;
        m.outlier_count = static_cast<int64_t>(values.shape(0));
        m.outlier_columns = columns.data(), m.outlier_rows = rows.data(), m.outlier_values = values.data();
        return m;
    }

    Fields tiled(const Words &words, const Words &edge, int64_t number, int64_t width, int64_t bits) const {
        return {words.data() + number * static_cast<int64_t>(words.shape(1)),
                edge.data() + number * static_cast<int64_t>(edge.shape(1)), out, width, static_cast<int>(bits),
                nullptr, nullptr, 0};
    }

    // Everything that is read through, but the order; std::invalid_argument, a ValueError in Python.
    void check() const {
        const auto [bits, group, scale_bits, zero_bits, supergroup, half] = form;
        const auto allowed = [](int64_t b) { return (2 <= b && b <= 8) || b == 16; };
        if (!allowed(bits) || bits == 16 || !allowed(scale_bits) || !allowed(zero_bits) || group < 0 || supergroup < 1)
            throw std::invalid_argument("this is no form of SpQR");
        const Matrix m = matrix(0);
        const auto fits = [&](const Words &words, const Words &edge, const Fields &tiled) {
            return words.shape(0) == codes.shape(0) && edge.shape(0) == codes.shape(0) &&
                   static_cast<int64_t>(words.shape(1)) == tiled.word_count() &&
                   static_cast<int64_t>(edge.shape(1)) == tiled.edge_count();
        };
        const auto is = [](size_t size, int64_t expected) { return static_cast<int64_t>(size) == expected; };
        const int64_t outliers = static_cast<int64_t>(values.shape(0)), places = count() * m.codes.tiles() * m.chunks;
        if (!fits(codes, codes_edge, m.codes) || !fits(scales, scales_edge, m.scales) || !fits(zeros, zeros_edge, m.zeros) ||
            !is(second.shape(0), count()) || !is(second.shape(1), (out + supergroup - 1) / supergroup) ||
            !is(second.shape(2), m.groups) || !is(second.shape(3), m.per_group) ||
            !(is(offsets.shape(0), places + 1) || is(offsets.shape(0), 1)) || !is(columns.shape(0), outliers) ||
            !is(rows.shape(0), (outliers + 1) / 2) || !is(order.shape(1), in) ||
            !(order.shape(0) <= 1 || order.shape(0) == codes.shape(0)))
            throw std::invalid_argument("the operands do not fit together");
        const int64_t *offset = offsets.data();
        if (offset[0] != 0 || offset[offsets.shape(0) - 1] != outliers ||
            !std::is_sorted(offset, offset + offsets.shape(0)))
            throw std::invalid_argument("outlier offsets must rise from 0 to the number of outliers");
    }
};

// A stack of `grouped`, as it is stored: k matrices of out rows, one above another.
struct Grouped {
    Array<const uint8_t, 2> codes, zeros;
    Array<const uint16_t, 2> scales;
    Array<const int64_t, 2> order;
    int64_t out, in;
    std::array<int64_t, 3> form;  // bits, group or 0, symmetric
    int64_t matrices;

    int bits() const { return static_cast<int>(form[0]); }
    int64_t count() const { return matrices; }
    int64_t segment() const { return segment_of(form[1], in); }
    int64_t groups() const { return form[1] ? std::max<int64_t>(1, (in + form[1] - 1) / form[1]) : 1; }

    Matrix matrix(int64_t number, Fill fill = nullptr) const {
        const auto [bits, group, symmetric] = form;
        Matrix m{};
        m.rows = out, m.fill = fill;
        m.group = group ? group : std::numeric_limits<int64_t>::max() / 64;
        m.groups = groups();
        m.codes = rows_of(codes, number, in, bits);
        m.scales = rows_of(scales, number, m.groups, 16);
        m.zeros = rows_of(zeros, number, m.groups, bits);
        m.supergroup = 16;
        m.bfloat = true, m.symmetric = symmetric != 0;
        return m;
    }

    template <class T>
    Fields rows_of(const Array<T, 2> &from, int64_t number, int64_t width, int64_t bits) const {
        const auto *bytes = reinterpret_cast<const uint8_t *>(from.data());
        const int64_t stride = from.shape(1) * sizeof(T);
        return {nullptr, nullptr, out, width, static_cast<int>(bits),
                bytes + number * out * stride, bytes + from.shape(0) * stride, stride};
    }

    void check() const {
        if (form[0] < 2 || form[0] > 8 || form[1] < 0) throw std::invalid_argument("this is no form of grouped codes");
        const auto packed = [&](int64_t fields) { return (fields * form[0] + 7) / 8; };
        const int64_t rows = matrices * out;
        if (codes.shape(0) != rows || scales.shape(0) != rows || zeros.shape(0) != rows || codes.shape(1) != packed(in) ||
            scales.shape(1) != groups() || zeros.shape(1) != (form[2] ? 0 : packed(groups())) || order.shape(1) != in ||
            !(order.shape(0) <= 1 || order.shape(0) == matrices))
            throw std::invalid_argument("the operands do not fit together");
    }
};

template <class T, size_t N>
void take(nb::handle tensor, Array<T, N> &to) {
    to = array<T, N>(tensor);
}

bool is_bfloat(nb::handle tensor) {
    return halfbit::described(tensor).dtype.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat);
}

// The fields of `reference.Operands` in their order.
Stack stack(const nb::list &t, const std::array<int64_t, 6> &form) {
    Stack s{};
    take(t[0], s.codes), take(t[1], s.codes_edge), take(t[2], s.scales), take(t[3], s.scales_edge);
    take(t[4], s.zeros), take(t[5], s.zeros_edge), take(t[6], s.second), take(t[7], s.offsets);
    take(t[8], s.columns), take(t[9], s.rows), take(t[10], s.values), take(t[11], s.order);
    const auto extent = array<const char, 3>(t[12]);
    s.out = extent.shape(0), s.in = extent.shape(1);
    s.form = form, s.bfloat = is_bfloat(t[6]);
    if (s.bfloat != is_bfloat(t[10])) throw std::invalid_argument("outliers and statistics must have one dtype");
    return s;
}

// What `Grouped.runtime` gives, as so many matrices of `out` rows and `in` columns.
Grouped grouped(const nb::list &t, const std::array<int64_t, 3> &form, int64_t matrices, int64_t out, int64_t in) {
    Grouped s{};
    take(t[0], s.codes), take(t[1], s.scales), take(t[2], s.zeros), take(t[3], s.order);
    if (!is_bfloat(t[1])) throw std::invalid_argument("scales must be bfloat16");
    s.form = form, s.out = out, s.in = in, s.matrices = matrices;
    return s;
}

// ---------------------------------------------------------------------------------------------------------------- product

// Tokens that go through a matrix together.
struct Pass {
    int64_t number, first, tokens, lanes;
    int64_t panels;  // of `lanes` tokens each; 0: few tokens, all in one
    Many many;       // null: one token, by the kernel made for that, or panels
    Floats x;        // [width, lanes], or as `Kernels::rows` takes it: columns as stored, zeros where is no column or token
    Floats sums;     // of segments, for the kernels of one token
    std::vector<int32_t> digits;  // empty: this pass is not in whole numbers
};

constexpr int64_t tiles_at_once = 4;    // that a thread takes
constexpr int64_t many_tiles = 16;      // the same with panels, at most
constexpr int64_t most_at_once = 512;   // tokens for which weights are decoded once
constexpr int64_t tiny_work = 1 << 18;  // weights times passes that are worth a thread

template <class S>
void pack(Pass &pass, int64_t panel, const S &s, const float *x) {
    const int64_t lanes = pass.lanes, width = padded(s.in), in = s.in, panels = std::max<int64_t>(pass.panels, 1);
    const int64_t orders = static_cast<int64_t>(s.order.shape(0));
    const int64_t *order = orders ? s.order.data() + (orders > 1 ? pass.number * in : 0) : nullptr;
    const int64_t tokens = std::clamp<int64_t>(pass.tokens - panel * lanes, 0, lanes);
    x += (pass.first + panel * lanes) * in;
    for (int64_t first = 0; first < width; first += many_columns) {
        float *to = &pass.x[(first * panels + panel * many_columns) * lanes];
        std::fill_n(to, many_columns * lanes, 0.0f);
        for (int64_t c = first; c < std::min(first + many_columns, in); ++c, to += lanes) {
            const int64_t from = order ? order[c] : c;
            if (from < 0 || from >= in) throw std::invalid_argument("the order names columns that are not there");
            for (int64_t t = 0; t < tokens; ++t) to[t] = x[t * in + from];
        }
    }
}

// What the kernels of one token take besides x.
void sum_segments(Pass &pass, int64_t width, int64_t segment, int bits, const Kernels &available) {
    pass.sums = floats(width / segment);
    for (int64_t i = 0; i < width / segment; ++i) {
        float sum = 0;
        for (int64_t c = 0; c < segment; ++c) sum += pass.x[i * segment + c];
        pass.sums[i] = sum;
    }
    if (!available.digits) return;
    pass.digits.resize(width / segment * digit_words(segment));
    if (!available.to_digits(pass.x.get(), pass.sums.get(), width, segment, 1 << (bits - 1), pass.digits.data()))
        pass.digits.clear();
}

// S: `Stack` or `Grouped`.
template <class S>
void product(const Array<const float, 2> &x, const Array<const int64_t, 1> &starts, const S &s, const Array<float, 2> &y,
             int threads) {
    const nb::gil_scoped_release release;
    s.check();
    const int64_t tokens = x.shape(0), groups = static_cast<int64_t>(starts.shape(0)) - 1;
    const int64_t *start = starts.data();
    if (groups != s.count() || start[0] != 0 || start[groups] != tokens || !std::is_sorted(start, start + groups + 1))
        throw std::invalid_argument("starts must rise from 0 to the number of tokens, one group for each matrix");
    if (static_cast<int64_t>(x.shape(1)) != s.in || static_cast<int64_t>(y.shape(0)) != tokens ||
        static_cast<int64_t>(y.shape(1)) != s.out)
        throw std::invalid_argument("x and y do not fit the matrices");

    const int64_t segment = s.segment();
    const Kernels available = kernels(halfbit::active_isa, s.bits(), segment);
    std::vector<Pass> passes;
    for (int64_t g = 0; g < groups; ++g) {
        for (int64_t first = start[g]; first < start[g + 1];) {
            const int64_t left = start[g + 1] - first;
            Pass pass{g, first, 0, 0, 0, nullptr, {}, {}, {}};
            if (available.rows && left > available.many.back().first) {
                // equal parts, and of a part equal panels
                const int64_t parts = (left + most_at_once - 1) / most_at_once;
                pass.tokens = (left + parts - 1) / parts;
                pass.panels = (pass.tokens + available.most_tokens - 1) / available.most_tokens;
                pass.lanes = (pass.tokens + pass.panels - 1) / pass.panels;
            } else {
                auto fitting = available.many.begin();
                while (fitting->first < left && fitting + 1 != available.many.end()) ++fitting;
                pass.tokens = std::min(left, fitting->first), pass.lanes = fitting->first;
                if (pass.tokens > 1 || !available.one) pass.many = fitting->second;
            }
            pass.x = floats(std::max<int64_t>(pass.panels, 1) * padded(s.in) * pass.lanes);
            first += pass.tokens;
            passes.push_back(std::move(pass));
        }
    }
    int64_t work = 0;
    std::vector<std::pair<size_t, int64_t>> packing, items;  // of each pass its panels, and where its turns begin
    for (size_t i = 0; i < passes.size(); ++i) {
        const int64_t panels = std::max<int64_t>(passes[i].panels, 1);
        work += panels * s.out * s.in;
        for (int64_t p = 0; p < panels; ++p) packing.emplace_back(i, p);
    }
    threads = static_cast<int>(std::clamp<int64_t>(work / tiny_work, 1, std::max(threads, 1)));
    // with panels a thread takes many tiles at a time, which share x, but has several turns
    const int64_t tiles = (s.out + 15) / 16, abreast = std::max<int64_t>(available.abreast, 1);
    const int64_t share = threads == 1 ? tiles : static_cast<int64_t>(passes.size()) * tiles / (4 * threads);
    const int64_t rows_step = std::clamp(share, abreast, many_tiles) / abreast * abreast;
    for (size_t i = 0; i < passes.size(); ++i) {
        const int64_t step = passes[i].panels ? rows_step : tiles_at_once;
        for (int64_t tile = 0; tile < tiles; tile += step) items.emplace_back(i, tile);
    }
    halfbit::parallel(threads, packing.size(), [&](int64_t i) {
        Pass &pass = passes[packing[i].first];
        pack(pass, packing[i].second, s, x.data());
        if (!pass.panels && !pass.many) sum_segments(pass, padded(s.in), segment, s.bits(), available);
    });

    halfbit::parallel(threads, items.size(), [&](int64_t i) {
        const Pass &pass = passes[items[i].first];
        const Matrix m = s.matrix(pass.number, available.fill);
        const int64_t first = items[i].second;
        if (pass.panels) {
            const int64_t last = std::min(first + rows_step, tiles), size = pass.panels * pass.lanes * abreast * 16;
            const Floats sums = floats((last - first + abreast - 1) / abreast * size);
            std::fill_n(sums.get(), (last - first + abreast - 1) / abreast * size, 0.0f);
            available.rows(m, first, last, pass.x.get(), pass.panels, pass.lanes, sums.get());
            for (int64_t t = 0; t < pass.tokens; ++t)
                for (int64_t tile = first; tile < last; tile += abreast) {
                    const int64_t height = std::min(16 * std::min(tile + abreast, last), s.out) - 16 * tile;
                    std::memcpy(y.data() + (pass.first + t) * s.out + 16 * tile,
                                &sums[(tile - first) / abreast * size + t * abreast * 16], 4 * height);
                }
            return;
        }
        alignas(64) float sum[8 * 16];
        for (int64_t tile = first; tile < std::min(first + tiles_at_once, tiles); ++tile) {
            if (pass.many) pass.many(m, tile, pass.x.get(), sum);
            else if (!pass.digits.empty()) available.digits(m, tile, pass.x.get(), pass.digits.data(), sum);
            else available.one(m, tile, pass.x.get(), pass.sums.get(), sum);
            const int64_t height = std::min<int64_t>(16, s.out - 16 * tile);
            for (int64_t t = 0; t < pass.tokens; ++t)
                std::memcpy(y.data() + (pass.first + t) * s.out + 16 * tile, sum + 16 * t, 4 * height);
        }
    });
}

// ----------------------------------------------------------------------------------------------------------------- decode

// Rows `16 * first` to `16 * last` of one matrix, in the stored order of columns, to [columns, step].
template <class S>
void decode(const S &s, int64_t number, int64_t first, int64_t last, nb::handle place, int threads) {
    const auto to = array<char, 2>(place);
    const int size = halfbit::described(place).dtype.bits / 8, type = size == 4 ? 0 : is_bfloat(place) ? 1 : 2;
    const nb::gil_scoped_release release;
    s.check();
    const int64_t tiles = (s.out + 15) / 16, step = to.shape(1);
    if (number < 0 || number >= s.count() || first < 0 || first > last || last > tiles ||
        static_cast<int64_t>(to.shape(0)) != s.in || step < std::min(16 * last, s.out) - 16 * first)
        throw std::invalid_argument("the rows and their place do not fit together");
    const Kernels available = kernels(halfbit::active_isa, s.bits(), s.segment());
    const Matrix m = s.matrix(number, available.fill);
    threads = static_cast<int>(std::clamp<int64_t>((last - first) * 16 * s.in / tiny_work, 1, std::max(threads, 1)));
    // 512 columns of all tiles, then the next: a tile alone would write to thousands of pages in turn
    const int64_t panel = 16, blocks = m.codes.blocks(), height = last - first;
    halfbit::parallel(threads, (blocks + panel - 1) / panel * height, [&](int64_t i) {
        const int64_t tile = i % height, block = i / height * panel;
        available.decode(m, first + tile, block, std::min(block + panel, blocks), to.data() + 16 * tile * size, step, type);
    });
}

}  // namespace

HALFBIT_BINDINGS(spqr) {
    using Form = std::array<int64_t, 6>;
    using GroupedForm = std::array<int64_t, 3>;
    m.def("spqr_product", [](nb::handle x, nb::handle starts, nb::list operands, Form form, nb::handle y, int threads) {
        product(array<const float, 2>(x), array<const int64_t, 1>(starts), stack(operands, form), array<float, 2>(y), threads);
    }, "x"_a, "starts"_a, "operands"_a, "form"_a, "y"_a, "threads"_a,
          "x float32 [tokens, columns] times the matrix of each group -> into y float32 [tokens, out]");
    m.def("spqr_decode", [](nb::list operands, Form form, int64_t number, int64_t first, int64_t last, nb::handle to, int threads) {
        decode(stack(operands, form), number, first, last, to, threads);
    }, "operands"_a, "form"_a, "number"_a, "first"_a, "last"_a, "to"_a, "threads"_a,
          "Tiles first to last of a matrix, columns as stored -> into [columns, rows], float32, bfloat16 or float16");
    m.def("grouped_product", [](nb::handle x, nb::handle starts, nb::list operands, GroupedForm form, nb::handle y, int threads) {
        const auto inputs = array<const float, 2>(x);
        const auto bounds = array<const int64_t, 1>(starts);
        const auto outputs = array<float, 2>(y);
        const Grouped s = grouped(operands, form, bounds.shape(0) - 1, outputs.shape(1), inputs.shape(1));
        product(inputs, bounds, s, outputs, threads);
    }, "x"_a, "starts"_a, "operands"_a, "form"_a, "y"_a, "threads"_a,
          "As spqr_product; operands: codes, scale, zero, order; form: bits, group or 0, whether it is symmetric");
    m.def("grouped_decode", [](nb::list operands, GroupedForm form, int64_t matrices, int64_t number, int64_t first, int64_t last,
                               nb::handle to, int threads) {
        const int64_t rows = array<const char, 2>(nb::handle(operands[0])).shape(0), columns = array<const char, 2>(to).shape(0);
        decode(grouped(operands, form, matrices, matrices ? rows / matrices : 0, columns), number, first, last, to, threads);
    }, "operands"_a, "form"_a, "matrices"_a, "number"_a, "first"_a, "last"_a, "to"_a, "threads"_a,
          "As spqr_decode, of so many matrices one above another");
}
