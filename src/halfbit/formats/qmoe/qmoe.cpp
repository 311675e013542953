// QMoE on a CPU: encode, decode, and multiply straight from the codewords.
//
// A row is a run of 16-bit codewords; each stands for 2 to 28 ternary symbols of one fixed dictionary (README.md here).
// The dictionary arrives as one entry per codeword:
//
//   entry, 64 bits:  0-31 symbols 0..15, two bits each | 32-55 symbols 16..27 | 56-63 number of symbols, even, 2..28
//
// The product does not decode. Zeros are so likely in the published dictionary that no codeword has more than three
// other symbols (a fourth would put it below the probability of the last codeword, 1.14e-5). So a codeword is three
// terms level * x[column], and a second table says which; it is half as large and stays in a core's L2 cache:
//
//   terms, 32 bits:  three times { offset 5 bits | symbol 2 bits }, unused ones { 0 | 3 } | 21-23 zero | 24-31 length
//
// Three multiply-adds per codeword, without a branch, are all it takes for 22 weights: more in scalar code than decoding
// into vector registers gives, which multiplies the zeros too. Vectors are spent on tokens: x is laid out column by
// column, and one term multiplies up to 32 tokens at once. The work per weight stays below that of a dense product
// however many tokens there are, so there is no dense path. Two cases walk the symbols one by one instead: a row whose
// symbol 0 is not 0.0, and a dictionary with more than three other symbols in a codeword.
//
// No memory but x, the codewords and the tables is read whatever the codewords say; a row that does not end at its last
// column raises. x must be finite: an infinity at a zero weight is skipped, where a dense product gives NaN.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include <nanobind/ndarray.h>

#include "extension.h"
#include "floats.h"
#include "isa.h"
#include "parallel.h"

namespace nb = nanobind;
using namespace nb::literals;
using halfbit::floats;
using halfbit::Floats;
using halfbit::Isa;

namespace {

constexpr int64_t longest = 28;    // symbols in a codeword: 14 pairs
constexpr int64_t root = 1 << 16;  // of the dictionary's trie: codewords are its other nodes

inline int64_t length(uint64_t entry) { return static_cast<int64_t>(entry >> 56); }

// Rows hold whole pairs: the last symbol of an odd row is a 0 that no weight owns.
inline int64_t even(int64_t columns) { return columns + (columns & 1); }

// RuntimeError in Python: the bytes are damaged. Arguments that do not fit together are invalid_argument, a ValueError.
[[noreturn]] void damaged(int64_t row, const std::string &what) {
    throw std::runtime_error("row " + std::to_string(row) + ": " + what);
}

[[noreturn]] void wrong_length(int64_t row, int64_t got, int64_t columns) {
    damaged(row, "codewords stand for " + std::to_string(got) + " columns, expected " + std::to_string(even(columns)));
}

// The codewords of consecutive rows, with offsets that are checked before anything is read through them.
struct Rows {
    const uint16_t *words;
    int64_t count;
    const int64_t *offsets;

    const uint16_t *begin(int64_t row) const { return words + offsets[row]; }
    const uint16_t *end(int64_t row) const { return words + offsets[row + 1]; }
    int64_t size(int64_t row) const { return offsets[row + 1] - offsets[row]; }

    void check(int64_t row) const {
        if (offsets[row] < 0 || offsets[row] > offsets[row + 1] || offsets[row + 1] > count)
            damaged(row, "codewords " + std::to_string(offsets[row]) + " to " + std::to_string(offsets[row + 1]) +
                             " are not among the " + std::to_string(count) + " there are");
    }
};

// ------------------------------------------------------------------------------------------------------ encode, decode

// Greedy longest match, as the published encoder: extend the run while the dictionary has it, else emit and restart.
void encode_row(const uint8_t *symbol, int64_t columns, const int32_t *trie, std::vector<uint16_t> &out) {
    int64_t node = root;
    const auto step = [&](int pair) {
        int32_t child = trie[9 * node + pair];
        if (child < 0) {
            out.push_back(static_cast<uint16_t>(node));
            child = trie[9 * root + pair];
        }
        node = child;
    };
    for (int64_t i = 0; i + 1 < columns; i += 2) step(symbol[i] + 3 * symbol[i + 1]);
    if (columns & 1) step(symbol[columns - 1]);
    if (columns) out.push_back(static_cast<uint16_t>(node));
}

// Eight 2-bit symbols to eight bytes: halve the groups, 16 bits -> 2 x 8 -> 4 x 4 -> 8 x 2.
inline uint64_t spread(uint64_t symbols) {
    symbols = (symbols | symbols << 24) & 0x000000FF000000FF;
    symbols = (symbols | symbols << 12) & 0x000F000F000F000F;
    return (symbols | symbols << 6) & 0x0303030303030303;
}

void decode_row(const Rows &rows, int64_t row, const uint64_t *entries, int64_t columns, uint8_t *out) {
    rows.check(row);
    int64_t at = 0;
    for (const uint16_t *word = rows.begin(row); word < rows.end(row); ++word) {
        const uint64_t entry = entries[*word];
        // 32 bytes are written for up to 28 symbols; the last ones of a row would run over its end
        uint8_t last[32];
        uint8_t *to = at + 32 <= columns ? out + at : last;
        for (int part = 0; part < 4; ++part) {
            const uint64_t bytes = spread(entry >> (16 * part) & (part < 3 ? 0xFFFF : 0xFF));
            std::memcpy(to + 8 * part, &bytes, 8);
        }
        if (to == last && at < columns) std::memcpy(out + at, last, std::min(length(entry), columns - at));
        at += length(entry);
    }
    if (at != even(columns)) wrong_length(row, at, columns);
}

// -------------------------------------------------------------------------------------------------------------- terms

constexpr uint32_t no_term = 3 << 5;  // offset 0, symbol 3, whose level is 0.0

// The terms of every codeword; empty where a codeword of this dictionary has more than three.
std::vector<uint32_t> make_terms(const uint64_t *entries) {
    std::vector<uint32_t> terms(root);
    for (int64_t word = 0; word < root; ++word) {
        uint32_t packed = static_cast<uint32_t>(length(entries[word])) << 24;
        const uint64_t symbols = entries[word] << 8 >> 8;
        uint64_t left = (symbols | symbols >> 1) & 0x5555555555555555;  // the low bit of every symbol that is not 0
        for (int k = 0; k < 3; ++k, left &= left - 1) {
            const int bit = left ? __builtin_ctzll(left) : 0;
            packed |= (left ? bit / 2 | (symbols >> bit & 3) << 5 : no_term) << 7 * k;
        }
        if (left) return {};
        terms[word] = packed;
    }
    return terms;
}

template <int W>
struct Lanes {
    typedef float type __attribute__((vector_size(4 * W)));
};
template <>
struct Lanes<1> {
    using type = float;
};

// One row times `width` tokens. x is [columns, width], padded with zeros as far as the codewords can reach; level has the
// values of symbols 0..3, the last 0.0; sum is [width]. Returns the column at which the row ended.
using RowProduct = int64_t (*)(const uint16_t *word, const uint16_t *end, const uint32_t *terms, const float *level,
                               const float *x, float *sum);

// The tokens lie in N vectors of W.
template <int W, int N>
[[gnu::always_inline]] inline int64_t row_product(const uint16_t *word, const uint16_t *end, const uint32_t *terms,
                                                  const float *level, const float *x, float *sum) {
    using Vector = typename Lanes<W>::type;
    const float *at = x;
    const auto add = [&](uint16_t codeword, Vector (*a)[N]) __attribute__((always_inline)) {
        const uint32_t packed = terms[codeword];
        for (int k = 0; k < 3; ++k) {
            const float *column = at + (packed >> 7 * k & 31) * (W * N);
            const float weight = level[packed >> (7 * k + 5) & 3];
            for (int n = 0; n < N; ++n) {
                Vector x_n;
                std::memcpy(&x_n, column + W * n, sizeof x_n);
                a[k][n] += weight * x_n;
            }
        }
        at += (packed >> 24) * (W * N);
    };
    Vector total[N] = {};
    while (word < end) {
        // Sums of 32 codewords, then the sum of those: less rounding than one long sum. Two codewords in flight, or the
        // additions to one accumulator would wait for each other.
        const uint16_t *stop = word + std::min<int64_t>(end - word, 32);
        Vector a[3][N] = {}, b[3][N] = {};
        for (; word + 1 < stop; word += 2) add(word[0], a), add(word[1], b);
        if (word < stop) add(*word++, a);
        for (int n = 0; n < N; ++n) total[n] += (a[0][n] + b[0][n]) + (a[1][n] + b[1][n]) + (a[2][n] + b[2][n]);
    }
    std::memcpy(sum, total, sizeof total);
    return (at - x) / (W * N);
}

#define HALFBIT_ROW_PRODUCT(name, ...)                                                                             \
    template <int W, int N = 1>                                                                                    \
    __VA_ARGS__ int64_t name(const uint16_t *word, const uint16_t *end, const uint32_t *terms, const float *level, \
                             const float *x, float *sum) {                                                         \
        return row_product<W, N>(word, end, terms, level, x, sum);                                                 \
    }

HALFBIT_ROW_PRODUCT(portable, )
#ifdef HALFBIT_X86
HALFBIT_ROW_PRODUCT(avx2, [[gnu::target("avx2,fma,bmi2")]])
HALFBIT_ROW_PRODUCT(avx512, [[gnu::target("avx512f,avx2,fma,bmi2")]])
#endif

constexpr int64_t widest = 32;

// What one CPU offers, by rising width.
struct Kernel {
    int64_t width;
    RowProduct row;
};

std::vector<Kernel> kernels(Isa isa) {
#ifdef HALFBIT_X86
    if (isa >= Isa::avx512)
        return {{1, avx512<1>}, {4, avx512<4>}, {8, avx512<8>}, {16, avx512<16>}, {32, avx512<16, 2>}};
    if (isa == Isa::avx2) return {{1, avx2<1>}, {4, avx2<4>}, {8, avx2<8>}, {16, avx2<8, 2>}};
#endif
    static_cast<void>(isa);
    return {{1, portable<1>}, {4, portable<4>}, {8, portable<4, 2>}};
}

// The narrowest kernel that takes all the tokens, or else the widest.
Kernel fitting(const std::vector<Kernel> &kernels, int64_t tokens) {
    for (const Kernel &kernel : kernels)
        if (tokens <= kernel.width) return kernel;
    return kernels.back();
}

// Symbol by symbol: any levels, any dictionary. The padding of the last pair meets the zero that x is padded with.
int64_t row_by_symbol(const uint16_t *word, const uint16_t *end, const uint64_t *entries, const float *level,
                      const float *x, int64_t width, float *sum) {
    double total[widest] = {};
    int64_t at = 0;
    for (; word < end; ++word)
        for (int64_t i = 0; i < length(entries[*word]); ++i, ++at)
            for (int64_t t = 0; t < width; ++t) total[t] += double{level[entries[*word] >> 2 * i & 3]} * x[at * width + t];
    std::copy_n(total, width, sum);
    return at;
}

// ------------------------------------------------------------------------------------------------------------ product

// Tokens of one group that go through its rows together.
struct Pass {
    Kernel kernel;
    int64_t group, first, tokens;
    Floats x;  // [reach, kernel.width], zero where there is no column or no token
};
constexpr int64_t block_rows = 32;      // rows a thread takes at a time
constexpr int64_t tiny_work = 1 << 15;  // codewords that are worth a thread: some 50 microseconds

void pack(Pass &pass, const float *x, int64_t columns, int64_t reach) {
    const int64_t width = pass.kernel.width;
    pass.x = floats(reach * width);
    // 16 columns at a time, so that both sides stay in whole cache lines
    for (int64_t first = 0; first < columns; first += 16)
        for (int64_t t = 0; t < width; ++t)
            for (int64_t c = first; c < std::min(first + 16, columns); ++c)
                pass.x[c * width + t] = t < pass.tokens ? x[(pass.first + t) * columns + c] : 0.0f;
    std::fill(&pass.x[columns * width], &pass.x[reach * width], 0.0f);
}

using Words = nb::ndarray<const uint16_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Offsets = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Entries = nb::ndarray<const uint64_t, nb::shape<1 << 16>, nb::c_contig, nb::device::cpu>;
using Terms = nb::ndarray<const uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Trie = nb::ndarray<const int32_t, nb::shape<root + 1, 9>, nb::c_contig, nb::device::cpu>;
template <class T>
using Matrix = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void product(Matrix<const float> x, Offsets starts, Words words, Offsets offsets, Matrix<const float> levels,
             Entries entries, Terms terms, Matrix<float> y, int threads) {
    const int64_t tokens = x.shape(0), columns = x.shape(1), out = y.shape(1);
    const int64_t groups = static_cast<int64_t>(starts.shape(0)) - 1;
    const int64_t *start = starts.data();
    if (groups < 0 || start[0] != 0 || start[groups] != tokens || !std::is_sorted(start, start + groups + 1))
        throw std::invalid_argument("starts must rise from 0 to the number of tokens");
    if (static_cast<int64_t>(y.shape(0)) != tokens || static_cast<int64_t>(offsets.shape(0)) != groups * out + 1 ||
        static_cast<int64_t>(levels.shape(0)) != groups * out || levels.shape(1) != 3)
        throw std::invalid_argument("x, y, starts, row offsets and levels do not fit together");
    const Rows rows{words.data(), static_cast<int64_t>(words.shape(0)), offsets.data()};
    const std::vector<Kernel> available = kernels(halfbit::active_isa);
    const bool by_terms = terms.shape(0) == root;

    std::vector<Pass> passes;
    int64_t most = 0, work = 0;
    for (int64_t g = 0; g < groups; ++g) {
        if (start[g] == start[g + 1]) continue;
        for (int64_t row = g * out; row < (g + 1) * out; ++row) {
            rows.check(row);
            most = std::max(most, rows.size(row));
        }
        for (int64_t first = start[g]; first < start[g + 1];) {
            const int64_t left = start[g + 1] - first;
            const Kernel kernel = fitting(available, left);
            passes.push_back({kernel, g, first, std::min(left, kernel.width), nullptr});
            first += passes.back().tokens;
            work += rows.offsets[(g + 1) * out] - rows.offsets[g * out];
        }
    }
    threads = static_cast<int>(std::clamp<int64_t>(work / tiny_work, 1, std::max(threads, 1)));

    // n codewords cannot reach beyond 28 n columns, so x is padded that far, up to twice its width; a row with more
    // codewords than that allows is walked before it is trusted. This costs the loop over codewords nothing.
    const int64_t reach = std::max(even(columns), std::min(longest * most, 2 * columns)) + 1;
    halfbit::parallel(threads, passes.size(), [&](int64_t i) { pack(passes[i], x.data(), columns, reach); });

    const int64_t blocks = (out + block_rows - 1) / block_rows;
    halfbit::parallel(threads, passes.size() * blocks, [&](int64_t i) {
        const Pass &pass = passes[i / blocks];
        const int64_t first = i % blocks * block_rows, last = std::min(first + block_rows, out);
        float *to = y.data() + pass.first * out;
        for (int64_t r = first; r < last; ++r) {
            const int64_t row = pass.group * out + r;
            const uint16_t *word = rows.begin(row), *end = rows.end(row);
            if (longest * rows.size(row) >= reach) {
                int64_t at = 0;
                for (const uint16_t *w = word; w < end; ++w) at += length(entries.data()[*w]);
                if (at != even(columns)) wrong_length(row, at, columns);
            }
            const float *l = levels.data() + 3 * row;
            const float level[4] = {l[0], l[1], l[2], 0.0f};
            float sum[widest];
            const int64_t at = by_terms && level[0] == 0.0f
                ? pass.kernel.row(word, end, terms.data(), level, pass.x.get(), sum)
                : row_by_symbol(word, end, entries.data(), level, pass.x.get(), pass.kernel.width, sum);
            if (at != even(columns)) wrong_length(row, at, columns);
            for (int64_t t = 0; t < pass.tokens; ++t) to[t * out + r] = sum[t];
        }
    });
}

// ----------------------------------------------------------------------------------------------- encode, decode: arrays

// A numpy array that owns the vector.
template <class T>
nb::ndarray<nb::numpy, T, nb::ndim<1>> array(std::vector<T> &&values) {
    auto *owned = new std::vector<T>(std::move(values));
    nb::capsule owner(owned, [](void *p) noexcept { delete static_cast<std::vector<T> *>(p); });
    return nb::ndarray<nb::numpy, T, nb::ndim<1>>(owned->data(), {owned->size()}, owner);
}

nb::tuple encode(Matrix<const uint8_t> symbols, Trie trie, int threads) {
    const int64_t count = symbols.shape(0), columns = symbols.shape(1), blocks = (count + block_rows - 1) / block_rows;
    std::vector<uint16_t> codewords;
    std::vector<int64_t> lengths(count);
    {
        const nb::gil_scoped_release release;
        if (std::any_of(trie.data() + 9 * root, trie.data() + 9 * (root + 1), [](int32_t child) { return child < 0; }))
            throw std::invalid_argument("the dictionary has no codeword for one of the nine single pairs");
        std::vector<std::vector<uint16_t>> parts(blocks);
        halfbit::parallel(threads, blocks, [&](int64_t block) {
            for (int64_t row = block * block_rows; row < std::min((block + 1) * block_rows, count); ++row) {
                const uint8_t *symbol = symbols.data() + row * columns;
                uint8_t highest = 0;
                for (int64_t c = 0; c < columns; ++c) highest = std::max(highest, symbol[c]);
                if (highest > 2)
                    throw std::invalid_argument("row " + std::to_string(row) + ": symbols must be 0, 1 or 2, got " +
                                                std::to_string(highest));
                const size_t before = parts[block].size();
                encode_row(symbol, columns, trie.data(), parts[block]);
                lengths[row] = static_cast<int64_t>(parts[block].size() - before);
            }
        });
        size_t total = 0;
        for (const auto &part : parts) total += part.size();
        codewords.reserve(total);
        for (const auto &part : parts) codewords.insert(codewords.end(), part.begin(), part.end());
    }
    return nb::make_tuple(array(std::move(codewords)), array(std::move(lengths)));
}

void decode(Words words, Offsets offsets, Entries entries, Matrix<uint8_t> symbols, int threads) {
    const Rows rows{words.data(), static_cast<int64_t>(words.shape(0)), offsets.data()};
    const int64_t count = symbols.shape(0), columns = symbols.shape(1);
    if (static_cast<int64_t>(offsets.shape(0)) != count + 1)
        throw std::invalid_argument("row offsets and symbols do not fit together");
    halfbit::parallel(threads, (count + block_rows - 1) / block_rows, [&](int64_t block) {
        for (int64_t row = block * block_rows; row < std::min((block + 1) * block_rows, count); ++row)
            decode_row(rows, row, entries.data(), columns, symbols.data() + row * columns);
    });
}

}  // namespace

HALFBIT_BINDINGS(qmoe) {
    m.def("qmoe_encode", encode, "symbols"_a.noconvert(), "trie"_a.noconvert(), "threads"_a,
          "symbols uint8 [rows, columns], trie int32 [65537, 9] -> codewords uint16 [n], codewords per row int64 [rows]");
    m.def("qmoe_decode", decode, "codewords"_a.noconvert(), "row_offsets"_a.noconvert(), "entries"_a.noconvert(),
          "symbols"_a.noconvert(), "threads"_a, nb::call_guard<nb::gil_scoped_release>(),
          "codewords uint16 [n], row_offsets int64 [rows + 1], entries uint64 [65536] -> into symbols uint8 [rows, columns]");
    m.def("qmoe_terms", [](Entries entries) { return array(make_terms(entries.data())); }, "entries"_a.noconvert(),
          "What qmoe_product needs beside entries; empty where a codeword has more than three symbols that are not 0.");
    m.def("qmoe_product", product, "x"_a.noconvert(), "starts"_a.noconvert(), "codewords"_a.noconvert(),
          "row_offsets"_a.noconvert(), "levels"_a.noconvert(), "entries"_a.noconvert(), "terms"_a, "y"_a.noconvert(),
          "threads"_a, nb::call_guard<nb::gil_scoped_release>(),
          "x float32 [tokens, columns] times the matrices of each group's rows -> into y float32 [tokens, out]");
}
