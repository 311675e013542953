// Run lengths on a CPU: encode, decode, and multiply straight from the stream.
//
// README.md has the layout and why decoding is what it is. One step decodes one symbol of each of the 32 lanes of a tile:
//
//   entry  = table[state % 256]             which gap, which sign
//   state  = slots * (state / 256) + number of the slot
//   if (state < 256) state = 256 * state + next byte of the tile, lanes in their order
//
// Some steps are decoded into a buffer of places and signs, and then each lane goes through its part of it. AVX-512 with byte
// permutations (VBMI, VBMI2: Ice Lake, Zen 4) decodes a step in registers: the table is six or eight vectors of bytes, and an
// expansion hands the next bytes to the lanes that need one. x is not gathered by vector instructions: single loads are no
// slower (Ice Lake: 22 cycles for 16 against 30). For several tokens x is laid out column by column, and one non-zero
// multiplies up to 32 of them at once. One token is added up in whole numbers of 64 bits, which is exact, and which leaves
// the vector units to decoding.
//
// No memory but the operands is touched whatever the bytes say: a tile that wants more bytes than it has, or does not end
// with every lane in the state in which encoding began, raises. x must be finite.
//
// For matrices with rotated columns x is rotated first, as rotation.py says: signs, then Hadamard blocks.

// GCC 12 takes the undefined sources of unmasked AVX-512 intrinsics in its own headers for mistakes.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include <nanobind/ndarray.h>

#include "extension.h"
#include "floats.h"
#include "isa.h"
#include "parallel.h"
#include "rotate.h"
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

constexpr int lanes_of_tile = 32;
constexpr uint32_t lowest = 256;      // of a state between two symbols; where encoding begins and decoding ends
constexpr int64_t steps_at_once = 64;  // decoded into a buffer before their products are taken
constexpr int64_t spare = 17 * 32;     // bytes that may be read behind a tile: sixteen steps of it, and a vector

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline uint32_t slots(uint32_t entry) { return entry & 255; }
inline uint32_t number(uint32_t entry) { return entry >> 8 & 255; }
inline uint32_t weights(uint32_t entry) { return entry >> 16 & 127; }
inline uint32_t code(uint32_t entry) { return entry >> 24; }

// ------------------------------------------------------------------------------------------------------------------ tiles

// `lanes.Lanes`: how one matrix is cut.
struct Cut {
    int64_t rows, columns, height, width, segments, bands;

    Cut(int64_t rows, int64_t columns, int64_t exponent) : rows(rows), columns(columns) {
        const int64_t line = int64_t{1} << exponent;
        height = std::max<int64_t>(1, line / std::max<int64_t>(columns, 1));
        width = ceil_div(columns, std::max<int64_t>(1, ceil_div(columns, line)));
        segments = ceil_div(columns, std::max<int64_t>(1, width));
        bands = ceil_div(rows, lanes_of_tile * height);
    }

    int64_t tiles() const { return bands * segments; }
};

// One tile: where its lanes are in the matrix.
struct Tile {
    int lanes;
    int64_t first_row, first_column;  // of lane 0
    int64_t height;                   // rows of a lane
    uint16_t length[lanes_of_tile];   // weights of a lane; 0 where there is no such lane

    Tile(const Cut &cut, int64_t index) {
        const int64_t band = index / cut.segments, segment = index % cut.segments;
        height = cut.height;
        first_row = band * lanes_of_tile * height;
        first_column = segment * cut.width;
        const int64_t columns = std::min(cut.width, cut.columns - first_column);
        lanes = static_cast<int>(std::min<int64_t>(lanes_of_tile, ceil_div(cut.rows - first_row, height)));
        for (int lane = 0; lane < lanes_of_tile; ++lane)
            length[lane] = static_cast<uint16_t>(
                columns * std::clamp<int64_t>(cut.rows - first_row - lane * height, 0, height));
    }

    // A lane's weights lie one after another, whether they are rows or a part of one.
    int64_t line(const Cut &cut, int lane) const {
        return (first_row + lane * height) * cut.columns + first_column;
    }
};

// One class: the entries of its slots, and the same in bytes. A slot has its symbol, 2 g + (0 minus, 1 plus), the skip's is
// 63 or 127; a symbol has its slots and its first slot.
struct Table {
    alignas(64) uint32_t entries[256];
    alignas(64) uint8_t symbol[256], slots_of[128] = {}, first[128] = {};
    int64_t gaps = 1;  // weights of the skip
    uint8_t skip = 127;

    bool narrow() const { return skip == 63; }

    explicit Table(const int32_t *from) {
        std::memcpy(entries, from, sizeof entries);
        if (std::none_of(entries, entries + 256, [](uint32_t e) { return weights(e) > 31 || slots(e) > 127; })) skip = 63;
        for (uint32_t slot = 0; slot < 256; ++slot) {
            const uint32_t entry = entries[slot];
            if (weights(entry) == 0 || weights(entry) > 63 || code(entry) > 2 || number(entry) > slot)
                throw std::invalid_argument("these are not the tables of runlength");
            symbol[slot] = code(entry) ? static_cast<uint8_t>(2 * (weights(entry) - 1) + code(entry) - 1) : skip;
            slots_of[symbol[slot]] = static_cast<uint8_t>(slots(entry));
            first[symbol[slot]] = static_cast<uint8_t>(slot - number(entry));
            if (!code(entry)) gaps = weights(entry);
        }
    }
};

// The bytes of consecutive tiles and what they are decoded with.
struct Stream {
    const uint8_t *bytes;
    int64_t count;
    const int64_t *offsets;
    const uint8_t *classes;
    int64_t tiles;
    std::vector<std::unique_ptr<const Table>> tables;  // of the classes that occur

    void check(int64_t tile) const {
        if (offsets[tile] < 0 || offsets[tile] > offsets[tile + 1] || offsets[tile + 1] > count || classes[tile] > 63)
            throw std::runtime_error("tile " + std::to_string(tile) + ": its bytes or its class are not among those there are");
    }
    const Table &table(int64_t tile) const { return *tables[classes[tile]]; }
    int64_t ahead(int64_t tile, int64_t other) const { return offsets[std::min(other, tiles)] - offsets[tile]; }
};

// The bytes of one tile, such that `spare` bytes can be read behind the last.
class Bytes {
public:
    Bytes(const Stream &stream, int64_t tile, const Tile &shape) : tile(tile) {
        stream.check(tile);
        at = stream.bytes + stream.offsets[tile];
        end = stream.bytes + stream.offsets[tile + 1];
        if (end - at < 2 * shape.lanes) damaged();
        if (stream.bytes + stream.count - end >= spare) return;
        copy.resize(end - at + spare);
        std::memcpy(copy.data(), at, end - at);
        end = copy.data() + (end - at);
        at = copy.data();
    }
    Bytes(const Bytes &) = delete;

    [[noreturn]] void damaged() const {
        throw std::runtime_error("tile " + std::to_string(tile) + ": does not end as it must");
    }

    const uint8_t *at, *end;

private:
    int64_t tile;
    std::vector<uint8_t> copy;
};

// Some steps of a tile: for each lane 0, or 2 * place + (code 1: 0, code 2: 1) of a non-zero, places in the lane's line
// counted from 1. They rise.
struct Steps {
    int64_t count;
    alignas(64) uint16_t index[steps_at_once * lanes_of_tile];
};

struct States {
    alignas(64) uint16_t state[lanes_of_tile];
    alignas(64) uint16_t position[lanes_of_tile];  // in its lane's line, doubled

    void begin(Bytes &bytes, const Tile &tile) {
        for (int lane = 0; lane < lanes_of_tile; ++lane) {
            position[lane] = 0, state[lane] = lowest;
            if (lane >= tile.lanes) continue;
            state[lane] = static_cast<uint16_t>(bytes.at[0] | bytes.at[1] << 8);
            bytes.at += 2;
        }
    }
    void end(const Bytes &bytes) const {
        if (bytes.at != bytes.end || std::any_of(state, state + lanes_of_tile, [](uint16_t s) { return s != lowest; }))
            bytes.damaged();
    }
};

// A tile on its way.
struct Job {
    Tile tile;
    Bytes bytes;
    const Table *table;
    States states;
    Steps steps;
    bool more;  // a lane has weights left
    int64_t ahead;  // bytes from this tile to the one that will be decoded in its place, which are fetched on the way

    Job(const Stream &from, int64_t index, const Tile &shape, int64_t following)
        : tile(shape), bytes(from, index, shape), table(&from.table(index)), more(true),
          ahead(from.ahead(index, following)) {
        states.begin(bytes, tile);
    }
};

// The products of some steps of a tile with W tokens, added to the sums of its rows, [rows, W].
//   levels [rows, 2]: the values of codes 1 and 2;  x [1 + columns of the tile, W], zeros first;  columns: of the matrix
using Multiply = void (*)(const Steps &, const Tile &, const float *levels, const float *x, int64_t columns, float *sums);

// Two tiles whole, whose lanes are parts of rows, with one token, added to sums [2, 32].
//   x [1 + columns of the tiles, 2]: zeros, then each column's number, negative and as it is
using Add = void (*)(Job *, const int64_t *x, int64_t *sums);

// What one kind of instructions offers.
struct Kernels {
    void (*next)(Job *, int count);  // decodes the next steps of one or two tiles; none of those that have no more
    Add add;
    float (*most)(const float *, int64_t count);  // the greatest magnitude, not finite if one is not
    void (*whole)(const float *, double scale, int64_t count, int64_t *to);  // [count, 2]: of each number -n and n
    std::vector<std::pair<int64_t, Multiply>> multiply;  // by rising number of tokens
};

template <int W>
struct Vector {
    typedef float type __attribute__((vector_size(4 * W)));
};
template <>
struct Vector<1> {
    using type = float;
};

// Nothing is known of the number behind this.
template <class T>
inline void apart(T &number) {
#ifdef __GNUC__
    asm("" : "+r"(number));
#else
    static_cast<void>(number);
#endif
}

namespace portable {
#include "steps.h"
Kernels kernels() { return {next, add, most, whole, multiplications()}; }
}  // namespace portable

#ifdef HALFBIT_X86
HALFBIT_TARGET("avx2,fma,bmi,bmi2")
namespace avx2 {
#include "steps.h"
Kernels kernels() { return {next, add, most, whole, multiplications()}; }
}  // namespace avx2
HALFBIT_TARGET_END

HALFBIT_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx2,fma,bmi,bmi2,popcnt")
namespace avx512 {
#include "steps.h"
#include "vbmi.h"
Kernels kernels() { return {next_in_registers, add_in_registers, most, whole, multiplications()}; }
}  // namespace avx512
HALFBIT_TARGET_END
#endif

Kernels kernels(Isa isa) {
#ifdef HALFBIT_X86
    static const bool permutes = __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
                                 __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                                 __builtin_cpu_supports("avx512vl");
    if (isa >= Isa::avx512 && permutes) return avx512::kernels();
    if (isa != Isa::portable) return avx2::kernels();
#endif
    static_cast<void>(isa);
    return portable::kernels();
}

using Entries = Array<const int32_t, 2>;

// The operands in the order of `RunLength.runtime`, but levels.
Stream stream(const Array<const uint8_t, 1> &bytes, const Array<const int64_t, 1> &offsets,
              const Array<const uint8_t, 1> &classes, const Entries &entries) {
    if (entries.shape(0) != 64 || entries.shape(1) != 256) throw std::invalid_argument("entries must be [64, 256]");
    if (offsets.shape(0) != classes.shape(0) + 1) throw std::invalid_argument("tile offsets and classes do not fit together");
    Stream from{bytes.data(), bytes.shape(0), offsets.data(), classes.data(), classes.shape(0), {}};
    from.tables.resize(64);
    for (int64_t i = 0; i < classes.shape(0); ++i) {
        auto &table = from.tables[classes.data()[i] & 63];
        if (!table) table = std::make_unique<const Table>(entries.data() + 256 * (classes.data()[i] & 63));
    }
    return from;
}

// ----------------------------------------------------------------------------------------------------------------- encode

void symbols_of(const uint8_t *line, int64_t length, const Table &table, std::vector<uint8_t> &out) {
    out.clear();
    int64_t begin = 0;  // behind the last non-zero
    const auto upto = [&](int64_t place) {
        for (; place - begin >= table.gaps; begin += table.gaps) out.push_back(table.skip);
    };
    for (int64_t first = 0; first < length; first += 8) {
        uint64_t eight = 0;
        if (first + 8 <= length) std::memcpy(&eight, line + first, 8);
        else std::memcpy(&eight, line + first, length - first);
        while (eight) {
            const int byte = __builtin_ctzll(eight) / 8;
            upto(first + byte);
            out.push_back(static_cast<uint8_t>(2 * (first + byte - begin) + (eight >> 8 * byte & 255) - 1));
            begin = first + byte + 1;
            eight &= ~(uint64_t{255} << 8 * byte);
        }
    }
    upto(length);
    if (begin == length) return;
    const int64_t by_gap = 2 * (length - begin);
    out.push_back(static_cast<uint8_t>(table.slots_of[by_gap] > table.slots_of[table.skip] ? by_gap : table.skip));
}

// One tile, from its end to its beginning.
std::vector<uint8_t> encode_tile(const uint8_t *codes, const Cut &cut, const Tile &tile, const Table &table,
                                 std::vector<uint8_t> (&lines)[lanes_of_tile]) {
    size_t steps = 0, count = 0;
    for (int lane = 0; lane < tile.lanes; ++lane) {
        symbols_of(codes + tile.line(cut, lane), tile.length[lane], table, lines[lane]);
        steps = std::max(steps, lines[lane].size());
        count += lines[lane].size();
    }
    std::vector<uint8_t> bytes(2 * tile.lanes + count);
    size_t at = bytes.size();
    uint32_t state[lanes_of_tile];
    std::fill_n(state, lanes_of_tile, lowest);
    for (size_t step = steps; step-- > 0;)
        for (int lane = tile.lanes; lane-- > 0;) {
            if (step >= lines[lane].size()) continue;
            const uint32_t symbol = lines[lane][step], n = table.slots_of[symbol];
            uint32_t &s = state[lane];
            if (s >= n << 8) bytes[--at] = static_cast<uint8_t>(s), s >>= 8;
            s = (s / n << 8) + table.first[symbol] + s % n;
        }
    for (int lane = tile.lanes; lane-- > 0;) {
        bytes[--at] = static_cast<uint8_t>(state[lane] >> 8);
        bytes[--at] = static_cast<uint8_t>(state[lane]);
    }
    bytes.erase(bytes.begin(), bytes.begin() + at);
    return bytes;
}

// A numpy array that owns the vector.
template <class T>
nb::ndarray<nb::numpy, T, nb::ndim<1>> owned(std::vector<T> &&values) {
    auto *vector = new std::vector<T>(std::move(values));
    nb::capsule owner(vector, [](void *p) noexcept { delete static_cast<std::vector<T> *>(p); });
    return nb::ndarray<nb::numpy, T, nb::ndim<1>>(vector->data(), {vector->size()}, owner);
}

nb::tuple encode(Array<const uint8_t, 2> codes, int64_t exponent, Array<const int64_t, 1> limits, Entries entries,
                 int threads) {
    const Cut cut(codes.shape(0), codes.shape(1), exponent);
    const int64_t tiles = cut.tiles();
    std::vector<uint8_t> all, classes(tiles);
    std::vector<int32_t> sizes(tiles);
    {
        const nb::gil_scoped_release release;
        std::vector<std::vector<uint8_t>> parts(tiles);
        halfbit::parallel(threads, cut.bands, [&](int64_t band) {
            std::vector<uint8_t> lines[lanes_of_tile];
            for (int64_t i = band * cut.segments; i < (band + 1) * cut.segments; ++i) {
                const Tile tile(cut, i);
                int64_t nonzeros = 0, total = 0;
                uint8_t highest = 0;
                for (int lane = 0; lane < tile.lanes; ++lane) {
                    const uint8_t *line = codes.data() + tile.line(cut, lane);
                    total += tile.length[lane];
                    int32_t some = 0;
                    for (int64_t c = 0; c < tile.length[lane]; ++c) some += line[c] != 0, highest = std::max(highest, line[c]);
                    nonzeros += some;
                }
                if (highest > 2) throw std::invalid_argument("codes must be 0, 1 or 2, got " + std::to_string(highest));
                // as `tables.classes`
                const int64_t *end = limits.data() + limits.shape(0);
                classes[i] = static_cast<uint8_t>(end - std::upper_bound(limits.data(), end, (nonzeros << 32) / total));
                const Table table(entries.data() + 256 * classes[i]);
                parts[i] = encode_tile(codes.data(), cut, tile, table, lines);
                sizes[i] = static_cast<int32_t>(parts[i].size());
            }
        });
        size_t count = 0;
        for (const auto &part : parts) count += part.size();
        all.reserve(count);
        for (const auto &part : parts) all.insert(all.end(), part.begin(), part.end());
    }
    return nb::make_tuple(owned(std::move(all)), owned(std::move(sizes)), owned(std::move(classes)));
}

// ----------------------------------------------------------------------------------------------------------------- decode

// Each non-zero of a tile: put(lane, place, code).
template <class Put>
void each(const Kernels &kernels, const Stream &from, int64_t index, const Tile &tile, const Put &put) {
    Job job(from, index, tile, index + 1);
    while (job.more) {
        kernels.next(&job, 1);
        for (int64_t i = 0; i < job.steps.count * lanes_of_tile; ++i)
            if (const int index = job.steps.index[i]) put(i % lanes_of_tile, index / 2 - 1, 1 + index % 2);
    }
    job.states.end(job.bytes);
}

constexpr int64_t tiny_work = 1 << 15;  // bytes that are worth a thread: some 50 microseconds

int worth(int64_t bytes, int threads) {
    return static_cast<int>(std::clamp<int64_t>(bytes / tiny_work, 1, std::max(threads, 1)));
}

// Bands `first` to `last` of the matrix whose tiles begin at `tile`, as codes or as weights, [rows of the bands, columns].
template <class T>
void decode(Array<const uint8_t, 1> bytes, Array<const int64_t, 1> offsets, Array<const uint8_t, 1> classes, Entries entries,
            int64_t tile, int64_t exponent, int64_t rows, Array<const float, 2> levels, int64_t first, int64_t last,
            Array<T, 2> to, int threads) {
    const Stream from = stream(bytes, offsets, classes, entries);
    const Cut cut(rows, to.shape(1), exponent);
    const int64_t begin = first * lanes_of_tile * cut.height, end = std::min(last * lanes_of_tile * cut.height, rows);
    if (exponent < 8 || exponent > 14 || tile < 0 || tile + cut.tiles() > classes.shape(0) ||
        first < 0 || first > last || last > cut.bands || to.shape(0) != std::max<int64_t>(end - begin, 0))
        throw std::invalid_argument("the tiles and their place do not fit together");
    if (sizeof(T) == 4 && (levels.shape(0) != rows || levels.shape(1) != 2))
        throw std::invalid_argument("levels must be [rows, 2]");
    const Kernels available = kernels(halfbit::active_isa);
    threads = worth((end - begin) * cut.columns / 8, threads);
    halfbit::parallel(threads, last - first, [&](int64_t band) {
        const int64_t top = (first + band) * lanes_of_tile * cut.height;
        const int64_t bottom = std::min(top + lanes_of_tile * cut.height, rows);
        std::fill(to.data() + (top - begin) * cut.columns, to.data() + (bottom - begin) * cut.columns, T{0});
        for (int64_t i = (first + band) * cut.segments; i < (first + band + 1) * cut.segments; ++i) {
            const Tile shape(cut, i);
            each(available, from, tile + i, shape, [&](int64_t lane, int64_t place, int code) {
                const int64_t at = shape.line(cut, static_cast<int>(lane)) + place;
                T &here = to.data()[at - begin * cut.columns];
                if constexpr (sizeof(T) == 4) here = levels.data()[2 * (at / cut.columns) + code - 1];
                else here = static_cast<T>(code);
            });
        }
    });
}

// ---------------------------------------------------------------------------------------------------------------- product

// Tokens that go through a matrix together.
struct Pass {
    int64_t matrix, first, tokens;
    int64_t lanes;  // numbers of a column in x: tokens and zeros
    Multiply multiply;
    bool add;  // one token in whole numbers
    Floats x;  // of each segment [1 + columns, lanes], zeros first
    std::unique_ptr<int64_t[]> whole;  // in place of it, [1 + columns, 2]: zeros, then numbers negative and as they are
    int exponent;                      // of two: what a one of them stands for
};

// Whole numbers of which all columns' sum fits 64 bits; of up to 32768 columns 47 bits for the greatest.
void pack_whole(Pass &pass, const float *x, float most, const Cut &cut, const Kernels &available) {
    int of_most = 0, of_columns = 0;
    std::frexp(most, &of_most);
    std::frexp(static_cast<float>(cut.columns), &of_columns);
    pass.exponent = of_most + of_columns - 62;
    pass.whole.reset(new int64_t[2 * (cut.columns + cut.segments)]);
    for (int64_t segment = 0; segment < cut.segments; ++segment) {
        const int64_t begin = segment * cut.width, end = std::min(begin + cut.width, cut.columns);
        int64_t *to = pass.whole.get() + 2 * (begin + segment);
        to[0] = to[1] = 0;
        available.whole(x + begin, std::ldexp(1.0, -pass.exponent), end - begin, to + 2);
    }
}

void pack(Pass &pass, const float *x, const Cut &cut, const Kernels &available) {
    x += pass.first * cut.columns;
    if (pass.add) {
        const float most = available.most(x, cut.columns);
        // what is no number is multiplied, so that it comes out as what it is
        pass.add = std::isfinite(most);
        if (pass.add) return pack_whole(pass, x, most, cut, available);
    }
    const int64_t lanes = pass.lanes, columns = cut.columns;
    pass.x = floats((columns + cut.segments) * lanes);
    for (int64_t segment = 0; segment < cut.segments; ++segment) {
        const int64_t begin = segment * cut.width, end = std::min(begin + cut.width, columns);
        float *to = pass.x.get() + (begin + segment) * lanes;
        std::fill_n(to, lanes, 0.0f);
        to += lanes - begin * lanes;
        // 16 columns at a time, so that both sides stay in whole cache lines
        for (int64_t first = begin; first < end; first += 16)
            for (int64_t t = 0; t < lanes; ++t)
                for (int64_t c = first; c < std::min(first + 16, end); ++c)
                    to[c * lanes + t] = t < pass.tokens ? x[t * columns + c] : 0.0f;
    }
}

void product(Array<const float, 2> x, Array<const int64_t, 1> starts, Array<const uint8_t, 1> bytes,
             Array<const int64_t, 1> offsets, Array<const uint8_t, 1> classes, Array<const uint8_t, 1> exponents,
             Array<const float, 2> levels, Entries entries, Array<const int8_t, 1> signs, Array<float, 2> y, int threads) {
    const Stream from = stream(bytes, offsets, classes, entries);
    const int64_t tokens = x.shape(0), columns = x.shape(1), out = y.shape(1);
    const int64_t groups = starts.shape(0) - 1;
    const int64_t *start = starts.data();
    if (groups != exponents.shape(0) || start[0] != 0 || start[groups] != tokens ||
        !std::is_sorted(start, start + groups + 1))
        throw std::invalid_argument("starts must rise from 0 to the number of tokens, one group for each matrix");
    if (y.shape(0) != tokens || levels.shape(0) != groups * out ||
        levels.shape(1) != 2 || (signs.shape(0) && signs.shape(0) != columns))
        throw std::invalid_argument("x, y and levels do not fit together");
    std::vector<int64_t> tiles{0};  // where those of each matrix begin
    for (int64_t g = 0; g < groups; ++g) {
        if (exponents.data()[g] < 8 || exponents.data()[g] > 14) throw std::invalid_argument("exponents must be 8 to 14");
        tiles.push_back(tiles.back() + Cut(out, columns, exponents.data()[g]).tiles());
    }
    if (tiles.back() != classes.shape(0))
        throw std::invalid_argument("the tiles are not those of the matrices");

    const Kernels available = kernels(halfbit::active_isa);
    std::vector<Pass> passes;
    std::vector<std::pair<int64_t, int64_t>> items;  // pass, the first of two bands
    int64_t work = 0;
    for (int64_t g = 0; g < groups; ++g) {
        if (start[g] == start[g + 1]) continue;
        const Cut cut(out, columns, exponents.data()[g]);
        const float *level = levels.data() + 2 * g * out;
        bool opposite = cut.height == 1;
        for (int64_t row = 0; row < out && opposite; ++row) opposite = level[2 * row] == -level[2 * row + 1];
        for (int64_t first = start[g]; first < start[g + 1];) {
            const int64_t left = start[g + 1] - first;
            auto fitting = available.multiply.begin();
            while (fitting->first < left && fitting + 1 != available.multiply.end()) ++fitting;
            const int64_t taken = std::min(left, fitting->first);
            passes.push_back({g, first, taken, fitting->first, fitting->second, taken == 1 && opposite, nullptr, nullptr, 0});
            first += taken;
            work += offsets.data()[tiles[g + 1]] - offsets.data()[tiles[g]];
            for (int64_t band = 0; band < cut.bands; band += 2) items.emplace_back(passes.size() - 1, band);
        }
    }
    threads = worth(work, threads);
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
    halfbit::parallel(threads, passes.size(), [&](int64_t i) {
        pack(passes[i], given, Cut(out, columns, exponents.data()[passes[i].matrix]), available);
    });

    halfbit::parallel(threads, items.size(), [&](int64_t item) {
        const auto [number, band] = items[item];
        const Pass &pass = passes[number];
        const Cut cut(out, columns, exponents.data()[pass.matrix]);
        const int count = band + 1 < cut.bands ? 2 : 1;
        const int64_t height = lanes_of_tile * cut.height, width = pass.lanes;
        const int64_t top = band * height, bottom = std::min(top + count * height, out);
        const float *level = levels.data() + 2 * (pass.matrix * out + top);
        const auto jobs_of = [&](int64_t segment) {
            const auto job = [&](int64_t i) {
                const int64_t tile = (band + i) * cut.segments + segment, number = tiles[pass.matrix] + tile;
                const int64_t following = number + 1 + (segment + 1 < cut.segments ? 0 : cut.segments);
                return Job(from, number, Tile(cut, tile), following);
            };
            // the second one stands for nothing where there is one band
            return std::array<Job, 2>{job(0), job(count - 1)};
        };
        if (pass.add) {
            int64_t sums[2 * lanes_of_tile] = {};
            for (int64_t segment = 0; segment < cut.segments; ++segment) {
                std::array<Job, 2> jobs = jobs_of(segment);
                available.add(jobs.data(), pass.whole.get() + 2 * segment * (cut.width + 1), sums);
                for (int i = 0; i < count; ++i) jobs[i].states.end(jobs[i].bytes);
            }
            for (int64_t row = top; row < bottom; ++row)
                y.data()[pass.first * out + row] = static_cast<float>(
                    std::ldexp(static_cast<double>(sums[row - top]), pass.exponent) * level[2 * (row - top) + 1]);
            return;
        }
        // as many as the tiles have lanes, also where the matrix ends before
        const Floats of_rows = floats(2 * count * height), sums = floats(count * height * width);
        std::fill(std::copy_n(level, 2 * (bottom - top), of_rows.get()), of_rows.get() + 2 * count * height, 0.0f);
        std::fill_n(sums.get(), count * height * width, 0.0f);
        for (int64_t segment = 0; segment < cut.segments; ++segment) {
            std::array<Job, 2> jobs = jobs_of(segment);
            const float *inputs = pass.x.get() + (jobs[0].tile.first_column + segment) * pass.lanes;
            while (jobs[0].more || (count == 2 && jobs[1].more)) {
                available.next(jobs.data(), count);
                for (int i = 0; i < count; ++i)
                    pass.multiply(jobs[i].steps, jobs[i].tile, of_rows.get() + 2 * i * height, inputs, columns,
                                  sums.get() + i * height * width);
            }
            for (int i = 0; i < count; ++i) jobs[i].states.end(jobs[i].bytes);
        }
        for (int64_t t = 0; t < pass.tokens; ++t)
            for (int64_t row = top; row < bottom; ++row) y.data()[(pass.first + t) * out + row] = sums[(row - top) * width + t];
    });
}

}  // namespace

HALFBIT_BINDINGS(runlength) {
    m.def("runlength_encode", [](nb::handle codes, int64_t exponent, nb::handle limits, nb::handle entries, int threads) {
        return encode(array<const uint8_t, 2>(codes), exponent, array<const int64_t, 1>(limits),
                      array<const int32_t, 2>(entries), threads);
    }, "codes"_a, "exponent"_a, "limits"_a, "entries"_a, "threads"_a,
          "codes uint8 [rows, columns] -> stream uint8 [n], bytes int32 [tiles], classes uint8 [tiles]");
    m.def("runlength_decode", [](nb::list t, int64_t tile, int64_t exponent, int64_t rows, nb::handle levels, int64_t first,
                                 int64_t last, nb::handle to, int threads) {
        const auto bytes = array<const uint8_t, 1>(t[0]);
        const auto offsets = array<const int64_t, 1>(t[1]);
        const auto classes = array<const uint8_t, 1>(t[2]);
        const auto entries = array<const int32_t, 2>(t[3]);
        const auto values = array<const float, 2>(levels);
        const auto into = [&](const auto &place) {
            const nb::gil_scoped_release release;
            decode(bytes, offsets, classes, entries, tile, exponent, rows, values, first, last, place, threads);
        };
        if (halfbit::described(to).dtype == nb::dtype<float>()) into(array<float, 2>(to));
        else into(array<uint8_t, 2>(to));
    }, "tensors"_a, "tile"_a, "exponent"_a, "rows"_a, "levels"_a, "first"_a, "last"_a, "to"_a, "threads"_a,
          "Bands first to last of the matrix of `rows` rows whose tiles begin at `tile` -> into codes uint8 or weights "
          "float32 [rows of the bands, columns]; tensors: stream, offsets, classes, entries");
    m.def("runlength_product", [](nb::handle x, nb::handle starts, nb::list t, nb::handle y, int threads) {
        const auto inputs = array<const float, 2>(x);
        const auto begins = array<const int64_t, 1>(starts);
        const auto bytes = array<const uint8_t, 1>(t[0]);
        const auto offsets = array<const int64_t, 1>(t[1]);
        const auto classes = array<const uint8_t, 1>(t[2]);
        const auto exponents = array<const uint8_t, 1>(t[3]);
        const auto levels = array<const float, 2>(t[4]);
        const auto entries = array<const int32_t, 2>(t[5]);
        const auto signs = array<const int8_t, 1>(t[6]);
        const auto outputs = array<float, 2>(y);
        const nb::gil_scoped_release release;
        product(inputs, begins, bytes, offsets, classes, exponents, levels, entries, signs, outputs, threads);
    }, "x"_a, "starts"_a, "tensors"_a, "y"_a, "threads"_a,
          "x float32 [tokens, columns] times the matrix of each group -> into y float32 [tokens, out]; tensors: what "
          "`RunLength.runtime` gives");
}
