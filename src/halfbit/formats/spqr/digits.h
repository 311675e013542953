// One token times one tile in whole numbers, for weights of 2 to 4 bits, where the CPU adds products of bytes: AVX-512 with
// VNNI, VBMI and VBMI2. Included once, behind avx512, inside a namespace and between target pragmas; no include guard.
//
// Per segment of 8, 16 or 32 columns x is unit * (65536 high + 256 middle + low), three signed bytes, no further from x than
// twice what float32 rounds the largest of the segment. Four codes of a row become the bytes of its lane, and one instruction adds their
// four products with a digit: with taking the codes apart five instructions for four columns, where floats take twelve. The
// sums are exact: 32 columns * 8 * 2^23 is the largest that there can be.

using avx512::add;
using avx512::all;
using avx512::F;
using avx512::fma;
using avx512::load;
using avx512::mul;
using avx512::store;
using avx512::sub;
using avx512::W;
using avx512::words;

constexpr float largest = 127 * 65536 + 127 * 256 + 127;

// False where x has infinities, NaN, or segments so small or large that the unit would not do. `sums` are those of segments.
inline bool to_digits(const float *x, const float *sums, int64_t width, int64_t segment, int32_t center, int32_t *to) {
    for (int64_t s = 0; s < width / segment; ++s, x += segment, to += digit_words(segment)) {
        __m256 sizes = _mm256_setzero_ps();
        bool in_range = true;
        for (int64_t c = 0; c < segment; c += 8) {
            const __m256 size = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), _mm256_loadu_ps(x + c));
            // false for NaN
            in_range &= _mm256_cmp_ps_mask(size, _mm256_set1_ps(1e30f), _CMP_LE_OQ) == 0xFF;
            sizes = _mm256_max_ps(sizes, size);
        }
        __m128 four = _mm_max_ps(_mm256_castps256_ps128(sizes), _mm256_extractf128_ps(sizes, 1));
        four = _mm_max_ps(four, _mm_movehl_ps(four, four));
        const float most = _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
        if (!in_range || (most > 0 && most < 1e-25f)) return false;
        // a power of two: most * each is from largest / 2 to largest, and no product is rounded but to a whole number
        const uint32_t exponent = bits_of(most) >> 23;
        float each = most > 0 ? of_bits((127 + 127 + 22 - exponent) << 23) : 0.0f;
        if (most * each > largest) each /= 2;
        __m256i sum = _mm256_setzero_si256();
        for (int64_t c = 0; c < segment; c += 8) {
            __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + c), _mm256_set1_ps(each)));
            sum = _mm256_add_epi32(sum, a);
            // the low digits of two times four columns, the middle ones, the high ones
            for (int digit = 2; digit >= 0; --digit) {
                const __m128i bytes = _mm256_cvtepi32_epi8(a);
                to[3 + 3 * (c / 4) + digit] = _mm_cvtsi128_si32(bytes);
                to[6 + 3 * (c / 4) + digit] = _mm_extract_epi32(bytes, 1);
                // the digit is signed: what is left without it, a byte further down
                a = _mm256_srai_epi32(_mm256_sub_epi32(a, _mm256_srai_epi32(_mm256_slli_epi32(a, 24), 24)), 8);
            }
        }
        alignas(32) int32_t parts[8];
        _mm256_store_si256(reinterpret_cast<__m256i *>(parts), sum);
        int32_t total = 0;
        for (const int32_t part : parts) total += part;
        to[0] = -center * total;
        to[1] = static_cast<int32_t>(bits_of(most > 0 ? 1 / each : 0.0f));
        to[2] = static_cast<int32_t>(bits_of(sums[s]));
    }
    return true;
}

// Of each lane the fields that begin at four places, as bytes; what is above a field comes along.
template <int A, int B, int C, int D>
[[gnu::always_inline]] inline W four(W a) {
    constexpr uint32_t low = A | B << 8 | C << 16 | D << 24;
    // the upper lane of each pair: 32 bits further
    constexpr uint64_t places = low | static_cast<uint64_t>(low + 0x20202020u) << 32;
    return _mm512_multishift_epi64_epi8(_mm512_set1_epi64(static_cast<int64_t>(places)), a);
}

// A block's fields: q[i] has columns 4i to 4i + 3 as the bytes of each lane.
template <int B>
[[gnu::always_inline]] inline void quads(const uint32_t *from, W (&q)[8]) {
    W w[B];
    for (int i = 0; i < B; ++i) w[i] = words(from + 16 * i);
    if constexpr (B == 2) {
        for (int i = 0; i < 2; ++i) {
            q[4 * i] = four<0, 2, 4, 6>(w[i]), q[4 * i + 1] = four<8, 10, 12, 14>(w[i]);
            q[4 * i + 2] = four<16, 18, 20, 22>(w[i]), q[4 * i + 3] = four<24, 26, 28, 30>(w[i]);
        }
    } else if constexpr (B == 3) {
        // bits 24 to 29 of word 0, two others, then word 1
        const W a = _mm512_shrdi_epi32(w[0], w[1], 24);
        // bits 22 to 29 of word 2, then the string across the tops
        W b = _mm512_shldi_epi32(avx512::right<30>(w[2]), w[1], 2);
        b = _mm512_shldi_epi32(b, w[0], 2);
        b = _mm512_shldi_epi32(b, avx512::left<2>(w[2]), 8);
        q[0] = four<0, 3, 6, 9>(w[0]), q[1] = four<12, 15, 18, 21>(w[0]);
        q[2] = four<0, 3, 8, 11>(a), q[3] = four<14, 17, 20, 23>(a);
        q[4] = four<18, 21, 24, 27>(w[1]);
        q[5] = four<0, 3, 6, 9>(w[2]), q[6] = four<12, 15, 18, 21>(w[2]);
        q[7] = four<2, 5, 8, 11>(b);
    } else {
        for (int i = 0; i < 4; ++i) q[2 * i] = four<0, 4, 8, 12>(w[i]), q[2 * i + 1] = four<16, 20, 24, 28>(w[i]);
    }
    const W mask = _mm512_set1_epi8((1 << B) - 1);
    for (int i = 0; i < 8; ++i) q[i] = _mm512_and_si512(q[i], mask);
}

// The same of words that are strings of bits, as they lie in a matrix that is stored row by row.
template <int B>
[[gnu::always_inline]] inline void quads_of_strings(const uint32_t *from, W (&q)[8]) {
    if constexpr (B != 3) return quads<B>(from, q);
    const W w[] = {words(from), words(from + 16), words(from + 32)};
    const W a = _mm512_shrdi_epi32(w[0], w[1], 24), b = _mm512_shrdi_epi32(w[1], w[2], 16);
    q[0] = four<0, 3, 6, 9>(w[0]), q[1] = four<12, 15, 18, 21>(w[0]);
    q[2] = four<0, 3, 6, 9>(a), q[3] = four<12, 15, 18, 21>(a);
    q[4] = four<0, 3, 6, 9>(b), q[5] = four<12, 15, 18, 21>(b);
    q[6] = four<8, 11, 14, 17>(w[2]), q[7] = four<20, 23, 26, 29>(w[2]);
    for (int i = 0; i < 8; ++i) q[i] = _mm512_and_si512(q[i], _mm512_set1_epi8(7));
}

// As `avx512::tile_one`, x in digits; `x` itself is for outliers.
template <int B, int S>
void tile_digits(const Matrix &m, int64_t tile, const float *x, const int32_t *digits, float *y) {
    constexpr float center = 1 << (B - 1);
    alignas(64) float scale[1024], *shift = scale + 512, apart[64] = {};
    avx512::Blocks blocks(m.codes, tile);
    const int64_t blocks_of_group = m.group % 32 ? m.codes.blocks() : m.group / 32;  // where S is 32
    F total = all(0.0f);
    for (int64_t stretch = 0, block = 0; block < m.codes.blocks(); ++stretch) {
        avx512::fetch_statistics(m, tile, stretch + 1);
        avx512::scales_and_shifts(m, tile, stretch, center, scale, shift);
        const int64_t first = block, stop = m.stretch_end(stretch);
        F sum = all(0.0f), less = all(0.0f);
        const float *of_group = scale;
        for (int64_t left = blocks_of_group; block < stop; ++block, --left) {
            W q[8];
            if (m.codes.first) {
                quads_of_strings<B>(blocks.strings(block), q);
            } else {
                const uint32_t *codes = m.codes.block(tile, block);
                for (int i = 0; i < B; ++i) __builtin_prefetch(codes + avx512::ahead + 16 * i);
                quads<B>(codes, q);
            }
            if (S == 32 && !left) of_group += 16, left = blocks_of_group;
#pragma GCC unroll 4
            for (int s = 0; s < 32 / S; ++s, digits += digit_words(S)) {
                W high = _mm512_setzero_si512(), middle = high, low = _mm512_set1_epi32(digits[0]);
#pragma GCC unroll 8
                for (int i = 0; i < S / 4; ++i) {
                    high = _mm512_dpbusd_epi32(high, q[S / 4 * s + i], _mm512_set1_epi32(digits[3 + 3 * i]));
                    middle = _mm512_dpbusd_epi32(middle, q[S / 4 * s + i], _mm512_set1_epi32(digits[4 + 3 * i]));
                    low = _mm512_dpbusd_epi32(low, q[S / 4 * s + i], _mm512_set1_epi32(digits[5 + 3 * i]));
                }
                middle = avx512::sum(middle, avx512::left<8>(high));
                low = avx512::sum(low, avx512::left<8>(middle));
                const F product = mul(avx512::from_int(low), all(of_bits(static_cast<uint32_t>(digits[1]))));
                sum = fma(load(of_group), product, sum);
                less = fma(load(of_group + 512), all(of_bits(static_cast<uint32_t>(digits[2]))), less);
                if (S < 32) of_group += 16;
            }
        }
        total = add(total, sub(sum, less));
        if (!m.has_outliers) continue;
        // a weight's outlier less the value of code 0, which stands there
        for (int64_t g = 0; g < 32; ++g)
            store(scale + 16 * g, fma(load(scale + 16 * g), all(center), load(shift + 16 * g)));
        for (int64_t chunk = first / 8; chunk < (stop + 7) / 8; ++chunk)
            avx512::chunk_outliers<S>(m, tile, chunk, stretch, first, scale, x + 256 * chunk, apart);
    }
    for (int i = 0; i < 4; ++i) total = add(total, load(apart + 16 * i));
    store(y, total);
}

template <int S>
auto digits_of(int bits) {
    constexpr decltype(&tile_digits<2, S>) all_bits[] = {tile_digits<2, S>, tile_digits<3, S>, tile_digits<4, S>};
    return bits <= 4 ? all_bits[bits - 2] : nullptr;
}

inline Kernels kernels(int bits, int64_t segment) {
    Kernels k = avx512::kernels(bits, segment);
    k.to_digits = to_digits;
    k.digits = segment == 8 ? digits_of<8>(bits) : segment == 16 ? digits_of<16>(bits) : segment == 32 ? digits_of<32>(bits) : nullptr;
    return k;
}
