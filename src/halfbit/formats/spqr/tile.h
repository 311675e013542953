// What is done with one tile of 16 rows, in the lanes of `lanes.h`. Included after it, once for each kind of lanes.
//
// A tile is walked in stretches of 32 groups, whose statistics are made first and stay in the first-level cache: a block of
// the tiled scales is 32 groups, as a block of the codes is 32 columns. Three kernels share this:
//
//   one token:    sum of code * x per group, then scale * sum - (scale * zero) * sum of x: three instructions per column
//                 and 16 rows. Codes and zeros are taken less the middle code, which keeps the two terms small. An outlier,
//                 whose code is 0, adds (value + scale * zero) * x.
//   few tokens:   a block's weights are made and put into the cache, outliers replaced, then multiplied with each token.
//   many tokens:  the same with some columns of several tiles, and tokens in panels.

// Bits `From` to `From + Count` of the strings that are the words of the lanes.
template <int From, int Count, int B>
[[gnu::always_inline]] inline W bits_at(const W (&w)[B]) {
    W a = right<From % 32>(w[From / 32]);
    if constexpr (From % 32 + Count > 32) a = either(a, left<32 - From % 32>(w[From / 32 + 1]));
    return lowest(a, (1u << Count) - 1);
}

// A block of strings of 32 fields, made into the words of a tile, where no field lies across the end of a word.
template <int B, int... I>
void to_tile(uint32_t *block, std::integer_sequence<int, I...>) {
    constexpr int body = 32 / B * B, spare = 32 - body;
    W w[B];
    for (int i = 0; i < B; ++i) w[i] = words(block + 16 * i);
    (store(block + 16 * I, either(bits_at<I * body, body>(w), left<body>(bits_at<B * body + I * spare, spare>(w)))), ...);
}

// Blocks of a tile, one after another. Of a matrix that lies row by row the words of 128 columns are transposed at a time.
class Blocks {
  public:
    Blocks(const Fields &of, int64_t of_tile) : from(of), tile(of_tile) {
        if (!from.first) return;
        for (int64_t lane = 0; lane < 16; ++lane)
            lines[lane] = from.first + std::min(16 * tile + lane, from.rows - 1) * from.stride;
    }

    // The words of a tiled matrix.
    const uint32_t *at(int64_t block) {
        if (!from.first) return from.block(tile, block);
        if (block < begin || block >= end) {
            take(block);
            for (int64_t b = 0; b < end - begin; ++b) {
                uint32_t *words = place + 16 * from.bits * b;
                if (from.bits == 3) to_tile<3>(words, std::make_integer_sequence<int, 3>());
                if (from.bits == 5) to_tile<5>(words, std::make_integer_sequence<int, 5>());
                if (from.bits == 6) to_tile<6>(words, std::make_integer_sequence<int, 6>());
                if (from.bits == 7) to_tile<7>(words, std::make_integer_sequence<int, 7>());
            }
        }
        return place + 16 * from.bits * (block - begin);
    }

    // Of a matrix that lies row by row: words that are strings of bits, as its rows are.
    [[gnu::always_inline]] const uint32_t *strings(int64_t block) {
        if (block < begin || block >= end) take(block);
        return place + 16 * from.bits * (block - begin);
    }

  private:
    static constexpr int most_words = 32;  // of a lane: 4 blocks of 8 bits

    void take(int64_t block) {
        begin = block, end = block + (from.bits == 16 ? 1 : 4);
        const int64_t words = (end - begin) * from.bits, offset = 4 * from.bits * block;
        // what comes next is the next tile: a row's share of it for each row of these blocks
        fetch(lines[0] + 16 * (from.stride + offset), 64 * words);
        if (from.end - lines[15] >= offset + 4 * most_words) {
            for (int64_t w = 0; w < words; w += 16) transpose(lines, offset + 4 * w, place + 16 * w);
            return;
        }
        uint8_t copies[16][4 * most_words] = {};
        const uint8_t *copy[16];
        for (int64_t lane = 0; lane < 16; ++lane) {
            copy[lane] = copies[lane];
            const int64_t there = from.end - lines[lane] - offset;
            std::memcpy(copies[lane], lines[lane] + offset, std::min<int64_t>(sizeof copies[lane], there));
        }
        for (int64_t w = 0; w < words; w += 16) transpose(copy, 4 * w, place + 16 * w);
    }

    void fetch(const uint8_t *p, int64_t bytes) const {
        for (const uint8_t *last = std::min(p + bytes, from.end); p < last; p += 64) __builtin_prefetch(p, 0, 2);
    }

    const Fields &from;
    const int64_t tile;
    const uint8_t *lines[16];
    int64_t begin = 0, end = 0;
    alignas(64) uint32_t place[16 * most_words];
};

#if HALFBIT_LANES == 0

// A block's 32 fields as numbers, [32, 16]: lane by lane, as README.md draws them.
template <int B>
void unpack(const uint32_t *from, float *to, bool bfloat) {
    constexpr int each = 32 / B, spare = 32 - each * B;
    constexpr uint32_t mask = (1u << B) - 1;
    for (int lane = 0; lane < 16; ++lane) {
        uint64_t string = 0;
        for (int i = 0; i < B; ++i) {
            const uint32_t word = from[16 * i + lane];
            for (int k = 0; k < each; ++k) {
                const uint32_t number = word >> B * k & mask;
                const float value = B == 16 ? float_of(static_cast<uint16_t>(number), bfloat) : static_cast<float>(number);
                to[16 * (each * i + k) + lane] = value;
            }
            if (spare) string |= static_cast<uint64_t>(word >> (each * B) % 32) << spare * i;
        }
        for (int k = 0; k < spare; ++k) to[16 * (each * B + k) + lane] = static_cast<float>(string >> B * k & mask);
    }
}

#else

constexpr uint32_t repeated(int bits, int count, uint32_t field) {
    uint32_t all_fields = 0;
    for (int i = 0; i < count; ++i) all_fields |= field << bits * i;
    return all_fields;
}

// Field I of the B words of a lane; `string` has the fields that lie across the tops of the words. Centered: less 2^(B-1),
// of words that `read` has made ready for that.
template <int B, int I, bool Centered>
[[gnu::always_inline]] inline F field(const W (&w)[B], W string) {
    constexpr int each = 32 / B;
    constexpr bool across = I >= each * B;
    constexpr int from = B * (across ? I - each * B : I % each);
    const W a = across ? string : w[across ? 0 : I / each];
    if constexpr (B <= table_bits)
        return by_table<B, Centered ? 1 << (B - 1) : 0>(right<from>(a));
    else if constexpr (Centered)
        return from_int(right_signed<32 - B>(left<32 - B - from>(a)));
    else
        return from_int(lowest(right<from>(a), (1u << B) - 1));
}

template <int B, int... N>
[[gnu::always_inline]] inline W tops(const W (&w)[B], std::integer_sequence<int, N...>) {
    constexpr int each = 32 / B, spare = 32 - each * B;
    W string = right<each * B>(w[0]);
    ((string = either(string, left<spare *(N + 1)>(right<each * B>(w[N + 1])))), ...);
    return string;
}

// The words of a block; returns the string of fields across their tops.
template <int B, bool Centered>
[[gnu::always_inline]] inline W read(const uint32_t *from, W (&w)[B]) {
    constexpr int each = 32 / B, spare = 32 - each * B;
    for (int i = 0; i < B; ++i) w[i] = words(from + 16 * i);
    W string = w[0];
    if constexpr (spare) string = tops<B>(w, std::make_integer_sequence<int, B - 1>());
    if constexpr (Centered && B > table_bits) {
        // with its top bit turned, a field is the centered number in two's complement
        for (int i = 0; i < B; ++i) w[i] = differ(w[i], repeated(B, each, 1u << (B - 1)));
        if constexpr (spare) string = differ(string, repeated(B, spare, 1u << (B - 1)));
    }
    return string;
}

// A block's 32 fields as numbers, [32, 16].
template <int B, int... I>
[[gnu::always_inline]] inline void unpack_fields(const uint32_t *from, float *to, std::integer_sequence<int, I...>) {
    W w[B];
    const W string = read<B, false>(from, w);
    (store(to + 16 * I, field<B, I, false>(w, string)), ...);
}

template <int B>
void unpack(const uint32_t *from, float *to, bool bfloat) {
    if constexpr (B == 16) {
        for (int i = 0; i < 16; ++i) {
            const W w = words(from + 16 * i);
            store(to + 32 * i, widen(w, bfloat)), store(to + 32 * i + 16, widen(right<16>(w), bfloat));
        }
    } else {
        unpack_fields<B>(from, to, std::make_integer_sequence<int, 32>());
    }
}

#endif

using Unpack = void (*)(const uint32_t *, float *, bool);

inline Unpack unpacker(int bits) {
    constexpr Unpack all_bits[] = {unpack<2>, unpack<3>, unpack<4>, unpack<5>, unpack<6>, unpack<7>, unpack<8>};
    return bits == 16 ? unpack<16> : all_bits[bits - 2];
}

// The same for few groups of a matrix that lies row by row.
constexpr int64_t few_groups = 8;
inline void lines_statistics(const Matrix &m, int64_t tile, int64_t stretch, int64_t begin, int64_t end, float *scale,
                             float *zero) {
    const int bits = m.zeros.bits;
    for (int64_t lane = 0; lane < 16; ++lane) {
        const int64_t row = std::min(16 * tile + lane, m.rows - 1);
        const uint8_t *scales = m.scales.first + row * m.scales.stride, *zeros = m.zeros.first + row * m.zeros.stride;
        for (int64_t g = begin; g < std::min(end, m.groups); ++g) {
            const int64_t to = 16 * (g - 32 * stretch) + lane, bit = bits * g;
            uint16_t stored;
            std::memcpy(&stored, scales + 2 * g, 2);
            scale[to] = float_of(stored, m.bfloat);
            int field = 1 << (bits - 1);
            if (!m.symmetric) {
                field = zeros[bit / 8] >> bit % 8;
                if (bit % 8 + bits > 8) field |= zeros[bit / 8 + 1] << (8 - bit % 8);
            }
            zero[to] = static_cast<float>(field & ((1 << bits) - 1));
        }
    }
}

// Scales and zeros of the groups `begin` to `end` among the 32 from `32 * stretch`, [32, 16] each.
inline void statistics(const Matrix &m, int64_t tile, int64_t stretch, int64_t begin, int64_t end, float *scale,
                       float *zero) {
    if (m.scales.first && end - begin <= few_groups) return lines_statistics(m, tile, stretch, begin, end, scale, zero);
    unpacker(m.scales.bits)(Blocks(m.scales, tile).at(stretch), scale, m.bfloat);
    if (m.symmetric) std::fill(zero, zero + 512, static_cast<float>(1 << (m.codes.bits - 1)));
    else unpacker(m.zeros.bits)(Blocks(m.zeros, tile).at(stretch), zero, m.bfloat);
    if (!m.per_group) return;
    const int64_t count = std::min(end, m.groups) - begin;
    scale += 16 * (begin - 32 * stretch), zero += 16 * (begin - 32 * stretch);
    const int64_t top = 16 * tile / m.supergroup, bottom = std::min(16 * tile + 15, m.rows - 1) / m.supergroup;
    alignas(64) float wide[32 * 4 + 16];
    int at = 0;
    for (float *to : {scale, zero}) {
        if ((to == scale ? m.scales.bits : m.zeros.bits) == 16) continue;
        if (top == bottom) {
            const uint16_t *second = m.second + (top * m.groups + begin) * m.per_group;
            if (at == 0) {
                int64_t i = 0;
                for (; i + 16 <= count * m.per_group; i += 16) store(wide + i, widen(second + i, m.bfloat));
                for (; i < count * m.per_group; ++i) wide[i] = float_of(second[i], m.bfloat);
            }
            for (int64_t g = 0; g < count; ++g) {
                const F step = all(wide[g * m.per_group + at]), start = all(wide[g * m.per_group + at + 1]);
                const F code = load(to + 16 * g);
                store(to + 16 * g, m.half ? round_to_half(mul(step, round_to_half(sub(code, start))))
                                          : mul(step, sub(code, start)));
            }
        } else {
            // supergroups end within the tile: each row has its own
            for (int64_t g = 0; g < count; ++g) {
                alignas(64) float step[16], start[16];
                for (int64_t lane = 0; lane < 16; ++lane) {
                    const int64_t row = std::min(16 * tile + lane, m.rows - 1);
                    const uint16_t *second = m.second + (row / m.supergroup * m.groups + begin + g) * m.per_group + at;
                    step[lane] = float_of(second[0], m.bfloat), start[lane] = float_of(second[1], m.bfloat);
                }
                const F difference = sub(load(to + 16 * g), load(start));
                store(to + 16 * g, m.half ? round_to_half(mul(load(step), round_to_half(difference)))
                                          : mul(load(step), difference));
            }
        }
        at += 2;
    }
}

#if HALFBIT_LANES

// The weights of a block, [32, 16], in groups of S = 8 or 16 columns, or all in one.
template <int B, int S, int... I>
[[gnu::always_inline]] inline void fill_fields(const uint32_t *from, const float *scale, const float *zero, float *to,
                                               std::integer_sequence<int, I...>) {
    W w[B];
    const W string = read<B, false>(from, w);
    (store(to + 16 * I, mul(load(scale + 16 * (I / S)), sub(field<B, I, false>(w, string), load(zero + 16 * (I / S))))), ...);
}

template <int B, int S>
void fill(const uint32_t *from, const float *scale, const float *zero, float *to) {
    fill_fields<B, S>(from, scale, zero, to, std::make_integer_sequence<int, 32>());
}

#endif

// The weights of a block for any groups and roundings.
inline void fill_any(const Matrix &m, const uint32_t *codes, int64_t block, int64_t stretch, const float *scale,
                     const float *zero, float *w) {
    unpacker(m.codes.bits)(codes, w, false);
    const int64_t first = 32 * block, end = std::min(first + 32, m.codes.columns);
    for (int64_t column = first; column < end;) {
        const int64_t group = column / m.group, stop = std::min((group + 1) * m.group, end);
        const F s = load(scale + 16 * (group - 32 * stretch)), z = load(zero + 16 * (group - 32 * stretch));
        for (; column < stop; ++column) {
            float *at = w + 16 * (column - first);
            store(at, m.half ? round_to_half(mul(s, round_to_half(sub(load(at), z)))) : mul(s, sub(load(at), z)));
        }
    }
}

// The weights of one block, [32, 16]; `outlier` is where the tile's outliers from this block on begin, and is moved on.
inline void block_weights(const Matrix &m, const uint32_t *codes, int64_t tile, int64_t block, int64_t stretch,
                          const float *scale, const float *zero, int64_t &outlier, float *w) {
    if (m.fill) {
        const int64_t group = 16 * (32 * block / m.group - 32 * stretch);
        m.fill(codes, scale + group, zero + group, w);
    } else {
        fill_any(m, codes, block, stretch, scale, zero, w);
    }
    const int64_t first = 32 * block, end = std::min(first + 32, m.codes.columns);
    std::fill(w + 16 * (end - first), w + 16 * 32, 0.0f);
    const int64_t chunk = block / 8;
    if (!m.has_outliers) return;
    if (block % 8 == 0) outlier = m.outlier_begin(tile, chunk);
    for (const int64_t last = m.outlier_begin(tile, chunk + 1); outlier < last; ++outlier) {
        const int64_t column = m.outlier_columns[outlier] - 32 * (block % 8);
        if (column >= 32) break;
        // damaged bytes may be out of order; a column behind this block is left out
        if (column >= 0) w[16 * column + m.outlier_row(outlier)] = float_of(m.outlier_values[outlier], m.bfloat);
    }
}

// Walks blocks `first` to `last` of a tile: `use(block, weights)`, which are [32, 16] at `place(block)`.
template <class Place, class Use>
[[gnu::always_inline]] inline void walk(const Matrix &m, int64_t tile, int64_t first, int64_t last, const Place &place,
                                        const Use &use) {
    alignas(64) float scale[512], zero[512];
    Blocks codes(m.codes, tile);
    int64_t outlier = m.has_outliers ? m.outlier_begin(tile, first / 8) : 0;
    for (int64_t block = first; block < last;) {
        const int64_t stretch = block / m.group, stop = std::min(last, m.stretch_end(stretch));
        statistics(m, tile, stretch, 32 * block / m.group, (32 * stop - 1) / m.group + 1, scale, zero);
        for (; block < stop; ++block) {
            float *w = place(block);
            block_weights(m, codes.at(block), tile, block, stretch, scale, zero, outlier, w);
            use(block, w);
        }
    }
}

// One tile times T tokens: x [columns, T], padded with zeros to whole blocks; y [T, 16].
template <int T>
void tile_product(const Matrix &m, int64_t tile, const float *x, float *y) {
    // several sums per token where there are few: one multiply-add need not wait for the last, and less is rounded away
    constexpr int sums = T <= 2 ? 4 : T == 4 ? 2 : 1;
    for (int t = 0; t < T; ++t) store(y + 16 * t, all(0.0f));
    alignas(64) float place[512];
    walk(m, tile, 0, m.codes.blocks(), [&](int64_t) { return place; }, [&](int64_t block, const float *w) {
        const float *of_block = x + 32 * T * block;
        F sum[sums][T];
        for (int s = 0; s < sums; ++s)
            for (int t = 0; t < T; ++t) sum[s][t] = all(0.0f);
        for (int c = 0; c < 32; c += sums)
            for (int s = 0; s < sums; ++s) {
                const F weight = load(w + 16 * (c + s));
                for (int t = 0; t < T; ++t) sum[s][t] = fma(weight, all(of_block[T * (c + s) + t]), sum[s][t]);
            }
        for (int t = 0; t < T; ++t) {
            for (int s = 1; s < sums; ++s) sum[0][t] = add(sum[0][t], sum[s][t]);
            store(y + 16 * t, add(load(y + 16 * t), sum[0][t]));
        }
    });
}

#if HALFBIT_LANES

// Tiles and tokens whose sums are kept in registers.
constexpr int tiles_abreast = HALFBIT_LANES == 512 ? 4 : 1, most_tokens = 6;

// Some columns of `tiles_abreast` tiles times T tokens: w [tiles_abreast, many_columns, 16], x [columns, T]; added to
// y [T, tiles_abreast, 16].
template <int T>
void panel_product(const float *w, const float *x, int64_t columns, float *y) {
    F sum[T][tiles_abreast];
    for (int t = 0; t < T; ++t)
        for (int r = 0; r < tiles_abreast; ++r) {
            sum[t][r] = all(0.0f);
            // from the second-level cache, for the end
            __builtin_prefetch(y + 16 * (tiles_abreast * t + r));
        }
    for (int64_t c = 0; c < columns; ++c) {
        F weight[tiles_abreast];
        for (int r = 0; r < tiles_abreast; ++r) weight[r] = load(w + 16 * (many_columns * r + c));
        for (int t = 0; t < T; ++t) {
            const F token = all(x[T * c + t]);
            for (int r = 0; r < tiles_abreast; ++r) sum[t][r] = fma(weight[r], token, sum[t][r]);
        }
    }
    for (int t = 0; t < T; ++t)
        for (int r = 0; r < tiles_abreast; ++r) {
            float *to = y + 16 * (tiles_abreast * t + r);
            store(to, add(load(to), sum[t][r]));
        }
}

using Panel = void (*)(const float *, const float *, int64_t, float *);

template <int... T>
Panel panel_of(int64_t tokens, std::integer_sequence<int, T...>) {
    constexpr Panel all_tokens[] = {panel_product<T + 1>...};
    return all_tokens[tokens - 1];
}

// Tiles `first` to `last` times panels of T tokens: x [width / many_columns, panels, many_columns, T];
// y [tiles / tiles_abreast, panels, T, tiles_abreast, 16]. Some columns of `tiles_abreast` tiles are decoded and stay in
// the first-level cache for all panels, as those columns of x and the sums do in the second for all tiles.
inline void rows_product(const Matrix &m, int64_t first, int64_t last, const float *x, int64_t panels, int64_t tokens,
                         float *y) {
    const Panel panel = panel_of(tokens, std::make_integer_sequence<int, most_tokens>());
    alignas(64) float w[tiles_abreast * many_columns * 16] = {};
    const int64_t blocks = m.codes.blocks(), step = many_columns / 32;
    for (int64_t block = 0; block < blocks; block += step, x += panels * many_columns * tokens) {
        const int64_t stop = std::min(block + step, blocks);
        float *to = y;
        for (int64_t tile = first; tile < last; tile += tiles_abreast) {
            for (int64_t i = 0; i < std::min<int64_t>(tiles_abreast, last - tile); ++i) {
                float *at = w + 16 * many_columns * i;
                walk(m, tile + i, block, stop, [&](int64_t b) { return at + 512 * (b - block); },
                     [](int64_t, const float *) {});
            }
            for (int64_t p = 0; p < panels; ++p, to += tokens * tiles_abreast * 16)
                panel(w, x + p * many_columns * tokens, 32 * (stop - block), to);
        }
    }
}

#endif

// The weights of some blocks of a tile, the columns one after another: to [columns, step], 16 rows of which are this tile's.
enum class To { floats, bfloats, halves };

inline void tile_decode(const Matrix &m, int64_t tile, int64_t first, int64_t last, void *to, int64_t step, To type) {
    const int64_t height = std::min<int64_t>(16, m.rows - 16 * tile);
    alignas(64) float place[512];
    walk(m, tile, first, last, [&](int64_t) { return place; }, [&](int64_t block, const float *w) {
        const int64_t end = std::min<int64_t>(32, m.codes.columns - 32 * block);
        for (int64_t c = 0; c < end; ++c) {
            const int64_t at = (32 * block + c) * step;
            if (type == To::floats) {
                float *out = static_cast<float *>(to) + at;
                if (height == 16) store(out, load(w + 16 * c));
                else std::memcpy(out, w + 16 * c, 4 * height);
            } else {
                uint16_t *out = static_cast<uint16_t *>(to) + at, part[16];
                narrow(height == 16 ? out : part, load(w + 16 * c), type == To::bfloats);
                if (height < 16) std::memcpy(out, part, 2 * height);
            }
        }
    });
}

#if HALFBIT_LANES

// `S` columns from `32 / S * segment` of a block, times x.
template <int B, int First, int... I>
[[gnu::always_inline]] inline F segment_sum(const W (&w)[B], W string, const float *x, std::integer_sequence<int, I...>) {
    F even = all(0.0f), odd = all(0.0f);
    ((I % 2 ? odd = fma(field<B, First + I, true>(w, string), all(x[First + I]), odd)
            : even = fma(field<B, First + I, true>(w, string), all(x[First + I]), even)), ...);
    return add(even, odd);
}

template <int B, int S, int... N>
[[gnu::always_inline]] inline void block_sums(const W (&w)[B], W string, const float *x, const float *sums,
                                              const float *scale, const float *shift, F &y, F &less,
                                              std::integer_sequence<int, N...>) {
    ((y = fma(load(scale + 16 * N), segment_sum<B, S * N>(w, string, x, std::make_integer_sequence<int, S>()), y),
      less = fma(load(shift + 16 * N), all(sums[N]), less)), ...);
}

// The second-level numbers a, b, c, d of 32 groups from `first`, [32, 4], widened; zeros where there is no group.
inline void second_level(const Matrix &m, int64_t supergroup, int64_t first, float *wide) {
    const int64_t count = 4 * std::min<int64_t>(32, m.groups - first);
    const uint16_t *from = m.second + (supergroup * m.groups + first) * 4;
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) store(wide + i, widen(from + i, m.bfloat));
    for (; i < 128; ++i) wide[i] = i < count ? float_of(from[i], m.bfloat) : 0.0f;
}

// Group I: its scales, and scale * (zero - center).
template <int B, int I>
[[gnu::always_inline]] inline void statistic(const W (&s)[B], W s_string, const W (&z)[B], W z_string, const float *wide,
                                             F center, float *scale, float *shift) {
    const float *second = wide + 4 * I;
    const F step = mul(all(second[0]), sub(field<B, I, false>(s, s_string), all(second[1])));
    const F zero = mul(all(second[2]), sub(field<B, I, false>(z, z_string), all(second[3])));
    store(scale + 16 * I, step), store(shift + 16 * I, mul(step, sub(zero, center)));
}

// As `statistics`, in one go, where scales and zeros have B bits and all rows of the tile are in one supergroup.
template <int B, int... I>
void shared_statistics(const Matrix &m, int64_t tile, int64_t stretch, F center, float *scale, float *shift,
                       std::integer_sequence<int, I...>) {
    alignas(64) float wide[128];
    second_level(m, 16 * tile / m.supergroup, 32 * stretch, wide);
    W s[B], z[B];
    const W s_string = read<B, false>(m.scales.block(tile, stretch), s);
    const W z_string = read<B, false>(m.zeros.block(tile, stretch), z);
    (statistic<B, I>(s, s_string, z, z_string, wide, center, scale, shift), ...);
}

// Words from here on that are fetched ahead of use: 2 KiB.
constexpr int64_t ahead = 512;

// Fetches what `scales_and_shifts` will read.
inline void fetch_statistics(const Matrix &m, int64_t tile, int64_t stretch) {
    if (m.scales.first) return;
    if (32 * stretch >= m.groups) ++tile, stretch = 0;
    const auto fetch = [](const void *p, int64_t bytes) {
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char *>(p) + i);
    };
    fetch(m.scales.block(tile, stretch), 64 * m.scales.bits);
    fetch(m.zeros.block(tile, stretch), 64 * m.zeros.bits);
    fetch(m.second + (16 * tile / m.supergroup * m.groups + 32 * stretch) * m.per_group, 64 * m.per_group);
}

// Scales of 32 groups and scale * (zero - center), [32, 16] each; zeros where there is no group: x is 0 there, but
// 0 * NaN is not.
inline void scales_and_shifts(const Matrix &m, int64_t tile, int64_t stretch, float center, float *scale, float *shift) {
    constexpr auto groups_of_block = std::make_integer_sequence<int, 32>();
    const bool shared = 16 * tile / m.supergroup == std::min(16 * tile + 15, m.rows - 1) / m.supergroup;
    if (shared && !m.half && m.scales.bits == 3 && m.zeros.bits == 3)
        return shared_statistics<3>(m, tile, stretch, all(center), scale, shift, groups_of_block);
    if (shared && !m.half && m.scales.bits == 4 && m.zeros.bits == 4)
        return shared_statistics<4>(m, tile, stretch, all(center), scale, shift, groups_of_block);
    statistics(m, tile, stretch, 32 * stretch, 32 * stretch + 32, scale, shift);
    const int64_t groups = std::min<int64_t>(32, m.groups - 32 * stretch);
    for (int64_t g = 0; g < groups; ++g)
        store(shift + 16 * g, mul(load(scale + 16 * g), sub(load(shift + 16 * g), all(center))));
    std::fill(scale + 16 * groups, scale + 512, 0.0f), std::fill(shift + 16 * groups, shift + 512, 0.0f);
}

// (value + less) * x of the outliers in 16 rows x 256 columns, to the sums of the 16 rows; each row has four, taken in turn.
// `less` are those of the chunk's first group on.
template <int S>
[[gnu::always_inline]] inline void chunk_outliers(const Matrix &m, int64_t tile, int64_t chunk, int64_t stretch,
                                                  int64_t first, const float *less, const float *x, float *sums) {
    int64_t at = m.outlier_begin(tile, chunk);
    const int64_t end = m.outlier_begin(tile, chunk + 1);
    if (at == end) return;
    if (S < 32) less += 16 * (256 / S) * (chunk - first / 8);
    // where the statistics of a column's group begin; damaged bytes may name columns behind the last group
    const auto group = [&](int64_t column) {
        return S == 8    ? 2 * (column & 0xF8)
               : S == 16 ? column & 0xF0
                         : 16 * std::min<int64_t>((256 * chunk + column) / m.group - 32 * stretch, 31);
    };
    __builtin_prefetch(m.outlier_values + at + 256), __builtin_prefetch(m.outlier_values + at + 288);
    __builtin_prefetch(m.outlier_columns + at + 256), __builtin_prefetch(m.outlier_rows + (at + 256) / 2);
    // sixteen values and rows at a time; those behind the last are another chunk's, and are added nowhere
    alignas(64) float value[16];
    for (; at + 18 <= m.outlier_count && at < end; at += 16) {
        // 16 rows from a byte that may begin with another's
        uint64_t rows;
        std::memcpy(&rows, m.outlier_rows + at / 2, 8);
        if (at % 2) rows = rows >> 4 | uint64_t{m.outlier_rows[at / 2 + 8]} << 60;
        store(value, widen(m.outlier_values + at, m.bfloat));
        const uint8_t *columns = m.outlier_columns + at;
        const auto one = [&](int64_t i) {
            const int64_t column = columns[i], row = rows & 15;
            rows >>= 4;
            sums[16 * (i % 4) + row] = std::fma(value[i] + less[group(column) + row], x[column], sums[16 * (i % 4) + row]);
        };
        const int64_t count = std::min<int64_t>(end - at, 16);
        int64_t i = 0;
        for (; i + 4 <= count; i += 4) one(i), one(i + 1), one(i + 2), one(i + 3);
        for (; i < count; ++i) one(i);
    }
    for (; at < end; ++at) {
        const int64_t column = m.outlier_columns[at], row = m.outlier_row(at);
        sums[row] += (float_of(m.outlier_values[at], m.bfloat) + less[group(column) + row]) * x[column];
    }
}

// One tile times one token, for groups of S = 8 or 16 columns, or of a multiple of S = 32.
// x is padded with zeros to whole chunks of 256; sums are those of S columns each; y [16].
template <int B, int S>
void tile_one(const Matrix &m, int64_t tile, const float *x, const float *sums, float *y) {
    constexpr float center = 1 << (B - 1);
    alignas(64) float scale[1024], *shift = scale + 512, apart[64] = {};
    Blocks blocks(m.codes, tile);
    const int64_t blocks_of_group = m.group % 32 ? m.codes.blocks() : m.group / 32;  // where S is 32
    F total = all(0.0f);
    for (int64_t stretch = 0, block = 0; block < m.codes.blocks(); ++stretch) {
        fetch_statistics(m, tile, stretch + 1);
        scales_and_shifts(m, tile, stretch, center, scale, shift);
        const int64_t first = block, stop = m.stretch_end(stretch);
        F sum = all(0.0f), less = all(0.0f);
        const float *of_group = scale;
        for (int64_t left = blocks_of_group; block < stop; ++block, --left) {
            W w[B];
            const uint32_t *codes = blocks.at(block);
            for (int i = 0; i < B; ++i) __builtin_prefetch(codes + ahead + 16 * i);
            const W string = read<B, true>(codes, w);
            if (S == 32 && !left) of_group += 16, left = blocks_of_group;
            block_sums<B, S>(w, string, x + 32 * block, sums + 32 / S * block, of_group, of_group + 512, sum,
                             less, std::make_integer_sequence<int, 32 / S>());
            if (S < 32) of_group += 16 * (32 / S);
        }
        total = add(total, sub(sum, less));
        if (!m.has_outliers) continue;
        // a weight's outlier less the value of code 0, which stands there
        for (int64_t g = 0; g < 32; ++g)
            store(scale + 16 * g, fma(load(scale + 16 * g), all(center), load(shift + 16 * g)));
        for (int64_t chunk = first / 8; chunk < (stop + 7) / 8; ++chunk)
            chunk_outliers<S>(m, tile, chunk, stretch, first, scale, x + 256 * chunk, apart);
    }
    for (int i = 0; i < 4; ++i) total = add(total, load(apart + 16 * i));
    store(y, total);
}

using One = void (*)(const Matrix &, int64_t, const float *, const float *, float *);

template <int S>
One one_of(int bits) {
    constexpr One all_bits[] = {tile_one<2, S>, tile_one<3, S>, tile_one<4, S>, tile_one<5, S>,
                                tile_one<6, S>, tile_one<7, S>, tile_one<8, S>};
    return all_bits[bits - 2];
}

template <int S>
Fill fill_of(int bits) {
    constexpr Fill all_bits[] = {fill<2, S>, fill<3, S>, fill<4, S>, fill<5, S>, fill<6, S>, fill<7, S>, fill<8, S>};
    return all_bits[bits - 2];
}

#endif

inline Kernels kernels([[maybe_unused]] int bits, [[maybe_unused]] int64_t segment) {
    Kernels k{};
#if HALFBIT_LANES
    k.fill = segment == 8 ? fill_of<8>(bits) : segment == 16 ? fill_of<16>(bits) : segment == 32 ? fill_of<32>(bits) : nullptr;
    k.one = segment == 8 ? one_of<8>(bits) : segment == 16 ? one_of<16>(bits) : segment == 32 ? one_of<32>(bits) : nullptr;
#endif
    k.decode = [](const Matrix &m, int64_t tile, int64_t first, int64_t last, void *to, int64_t step, int type) {
        tile_decode(m, tile, first, last, to, step, static_cast<To>(type));
    };
#if HALFBIT_LANES
    k.most_tokens = most_tokens, k.abreast = tiles_abreast, k.rows = rows_product;
#endif
#if HALFBIT_LANES == 512
    k.many = {{1, tile_product<1>}, {2, tile_product<2>}, {4, tile_product<4>}, {8, tile_product<8>}};
#else
    k.many = {{1, tile_product<1>}, {2, tile_product<2>}, {4, tile_product<4>}};
#endif
    return k;
}
