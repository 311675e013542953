// Sixteen lanes, one per row of a tile, in the instructions that HALFBIT_LANES names: 512 (AVX-512F), 256 (AVX2, FMA, F16C)
// or 0 (any CPU). Included once for each, inside a namespace and between target pragmas; no include guard.
//
//   F   sixteen float32        W   sixteen words of 32 bits
//
// Multiplications and additions are fused only by `fma`: this file is compiled with contraction off, because decoding must
// round exactly as `grids/bilevel.py` does.

#if HALFBIT_LANES == 512

using F = __m512;
using W = __m512i;

inline F load(const float *p) { return _mm512_loadu_ps(p); }
inline void store(float *p, F a) { _mm512_storeu_ps(p, a); }
inline F all(float a) { return _mm512_set1_ps(a); }
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline W words(const uint32_t *p) { return _mm512_loadu_si512(p); }
inline void store(uint32_t *p, W a) { _mm512_storeu_si512(p, a); }
inline W either(W a, W b) { return _mm512_or_si512(a, b); }
template <int N> inline W right(W a) { return _mm512_srli_epi32(a, N); }
template <int N> inline W left(W a) { return _mm512_slli_epi32(a, N); }

template <int N> inline W right_signed(W a) { return _mm512_srai_epi32(a, N); }
inline W differ(W a, uint32_t bits) { return _mm512_xor_si512(a, _mm512_set1_epi32(static_cast<int>(bits))); }
inline F from_int(W a) { return _mm512_cvtepi32_ps(a); }
inline W lowest(W a, uint32_t mask) { return _mm512_and_si512(a, _mm512_set1_epi32(static_cast<int>(mask))); }

// Up to 4 bits one permutation takes the lowest bits, looks at no others, converts, and subtracts what is to be subtracted.
constexpr int table_bits = 4;
template <int B, int Less>
inline F by_table(W a) {
    constexpr int m = (1 << B) - 1;
    const F table = _mm512_setr_ps((0 & m) - Less, (1 & m) - Less, (2 & m) - Less, (3 & m) - Less, (4 & m) - Less,
                                   (5 & m) - Less, (6 & m) - Less, (7 & m) - Less, (8 & m) - Less, (9 & m) - Less,
                                   (10 & m) - Less, (11 & m) - Less, (12 & m) - Less, (13 & m) - Less, (14 & m) - Less,
                                   (15 & m) - Less);
    return _mm512_permutexvar_ps(a, table);
}

inline W sum(W a, W b) { return _mm512_add_epi32(a, b); }
inline W bytes(const uint8_t *p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
}
// The sixteen half bytes of a number, the lowest first.
inline W nibbles(uint64_t a) {
    const W twice = _mm512_inserti64x4(_mm512_set1_epi32(static_cast<int>(a)), _mm256_set1_epi32(static_cast<int>(a >> 32)), 1);
    return lowest(_mm512_srlv_epi32(twice, _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28)), 15);
}
inline F gather(const float *p, W at) { return _mm512_i32gather_ps(at, p, 4); }
inline W gather(const int32_t *p, W at) { return _mm512_i32gather_epi32(at, p, 4); }

inline F from_half(__m256i a) { return _mm512_cvtph_ps(a); }
inline __m256i to_half(F a) { return _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F round_to_half(F a) { return from_half(to_half(a)); }
inline F from_bfloat(__m256i a) { return _mm512_castsi512_ps(left<16>(_mm512_cvtepu16_epi32(a))); }
inline __m256i to_bfloat(F a) {
    const W bits = _mm512_castps_si512(a), odd = _mm512_and_si512(right<16>(bits), _mm512_set1_epi32(1));
    return _mm512_cvtepi32_epi16(right<16>(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)))));
}
inline F widen(const uint16_t *p, bool bfloat) {
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
    return bfloat ? from_bfloat(a) : from_half(a);
}
inline void narrow(uint16_t *p, F a, bool bfloat) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), bfloat ? to_bfloat(a) : to_half(a));
}
// The 16-bit numbers in the lower halves of words.
inline F widen(W a, bool bfloat) {
    return bfloat ? _mm512_castsi512_ps(left<16>(a)) : from_half(_mm512_cvtepi32_epi16(a));
}


// Sixteen words of each of sixteen lines, from `offset` bytes on: to [16 words, 16 lanes].
inline void transpose(const uint8_t *const *lines, int64_t offset, uint32_t *to) {
    W a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(lines[i] + offset);
    for (int i = 0; i < 16; i += 2)
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]), b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    // four lanes of four words each, a[4 * lanes + word]
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]), a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]), a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        const W p = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x44), q = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x44);
        const W r = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xEE), s = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xEE);
        _mm512_storeu_si512(to + 16 * i, _mm512_shuffle_i32x4(p, q, 0x88));
        _mm512_storeu_si512(to + 16 * (4 + i), _mm512_shuffle_i32x4(p, q, 0xDD));
        _mm512_storeu_si512(to + 16 * (8 + i), _mm512_shuffle_i32x4(r, s, 0x88));
        _mm512_storeu_si512(to + 16 * (12 + i), _mm512_shuffle_i32x4(r, s, 0xDD));
    }
}

#elif HALFBIT_LANES == 256

struct F {
    __m256 a, b;
};
struct W {
    __m256i a, b;
};

inline F load(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float *p, F x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
inline F all(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
inline F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline __m256i half_words(const uint32_t *p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)); }
inline W words(const uint32_t *p) { return {half_words(p), half_words(p + 8)}; }
inline void store(uint32_t *p, W x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), x.a), _mm256_storeu_si256(reinterpret_cast<__m256i *>(p + 8), x.b);
}
inline W either(W x, W y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
template <int N> inline W right(W x) { return {_mm256_srli_epi32(x.a, N), _mm256_srli_epi32(x.b, N)}; }
template <int N> inline W left(W x) { return {_mm256_slli_epi32(x.a, N), _mm256_slli_epi32(x.b, N)}; }

template <int N> inline W right_signed(W x) { return {_mm256_srai_epi32(x.a, N), _mm256_srai_epi32(x.b, N)}; }
inline W differ(W x, uint32_t bits) {
    const __m256i y = _mm256_set1_epi32(static_cast<int>(bits));
    return {_mm256_xor_si256(x.a, y), _mm256_xor_si256(x.b, y)};
}
inline F from_int(W x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline W lowest(W x, uint32_t mask) {
    const __m256i y = _mm256_set1_epi32(static_cast<int>(mask));
    return {_mm256_and_si256(x.a, y), _mm256_and_si256(x.b, y)};
}

constexpr int table_bits = 3;
template <int B, int Less>
inline F by_table(W x) {
    constexpr int m = (1 << B) - 1;
    const __m256 table = _mm256_setr_ps((0 & m) - Less, (1 & m) - Less, (2 & m) - Less, (3 & m) - Less, (4 & m) - Less,
                                        (5 & m) - Less, (6 & m) - Less, (7 & m) - Less);
    return {_mm256_permutevar8x32_ps(table, x.a), _mm256_permutevar8x32_ps(table, x.b)};
}

inline W sum(W x, W y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline W bytes(const uint8_t *p) {
    const __m128i all16 = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
    return {_mm256_cvtepu8_epi32(all16), _mm256_cvtepu8_epi32(_mm_srli_si128(all16, 8))};
}
// The sixteen half bytes of a number, the lowest first.
inline W nibbles(uint64_t a) {
    const __m256i by = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    return lowest({_mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(a)), by),
                   _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(a >> 32)), by)}, 15);
}
inline F gather(const float *p, W at) { return {_mm256_i32gather_ps(p, at.a, 4), _mm256_i32gather_ps(p, at.b, 4)}; }
inline W gather(const int32_t *p, W at) {
    return {_mm256_i32gather_epi32(p, at.a, 4), _mm256_i32gather_epi32(p, at.b, 4)};
}

inline __m128i to_half(__m256 a) { return _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F round_to_half(F x) { return {_mm256_cvtph_ps(to_half(x.a)), _mm256_cvtph_ps(to_half(x.b))}; }
// The lower halves of 16 words, in their order.
inline __m256i lower_halves(W x) {
    const __m256i low = _mm256_set1_epi32(0xFFFF);
    const __m256i mixed = _mm256_packus_epi32(_mm256_and_si256(x.a, low), _mm256_and_si256(x.b, low));
    return _mm256_permute4x64_epi64(mixed, 0xD8);
}
inline __m256i bfloat_words(__m256 a) {
    const __m256i bits = _mm256_castps_si256(a), one = _mm256_set1_epi32(1);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
    return _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
}
inline F widen(__m128i a, __m128i b, bool bfloat) {
    if (!bfloat) return {_mm256_cvtph_ps(a), _mm256_cvtph_ps(b)};
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(a), 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(b), 16))};
}
inline F widen(const uint16_t *p, bool bfloat) {
    const auto *q = reinterpret_cast<const __m128i *>(p);
    return widen(_mm_loadu_si128(q), _mm_loadu_si128(q + 1), bfloat);
}
inline F widen(W x, bool bfloat) {
    const __m256i all16 = lower_halves(x);
    return widen(_mm256_castsi256_si128(all16), _mm256_extracti128_si256(all16, 1), bfloat);
}
inline void narrow(uint16_t *p, F x, bool bfloat) {
    const __m256i all16 =
        bfloat ? lower_halves({bfloat_words(x.a), bfloat_words(x.b)}) : _mm256_set_m128i(to_half(x.b), to_half(x.a));
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), all16);
}

// Sixteen words of each of sixteen lines, from `offset` bytes on: to [16 words, 16 lanes].
inline void transpose(const uint8_t *const *lines, int64_t offset, uint32_t *to) {
    for (int lane = 0; lane < 16; lane += 8)
        for (int word = 0; word < 16; word += 8) {
            __m256i a[8], b[8];
            for (int i = 0; i < 8; ++i)
                a[i] = half_words(reinterpret_cast<const uint32_t *>(lines[lane + i] + offset + 4 * word));
            for (int i = 0; i < 8; i += 2)
                b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]), b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
            for (int i = 0; i < 8; i += 4) {
                a[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]), a[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
                a[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]), a[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
            }
            for (int i = 0; i < 4; ++i) {
                auto *place = reinterpret_cast<__m256i *>(to + 16 * (word + i) + lane);
                _mm256_storeu_si256(place, _mm256_permute2x128_si256(a[i], a[4 + i], 0x20));
                _mm256_storeu_si256(place + 8, _mm256_permute2x128_si256(a[i], a[4 + i], 0x31));
            }
        }
}

#else

struct F {
    float v[16];
};
struct W {
    uint32_t v[16];
};

// of a function of the lane number
#define HALFBIT_EACH(T, value)                        \
    T out;                                            \
    for (int i = 0; i < 16; ++i) out.v[i] = (value);  \
    return out

inline F load(const float *p) { HALFBIT_EACH(F, p[i]); }
inline void store(float *p, F a) { std::memcpy(p, a.v, sizeof a.v); }
inline F all(float a) { HALFBIT_EACH(F, a); }
inline F add(F a, F b) { HALFBIT_EACH(F, a.v[i] + b.v[i]); }
inline F sub(F a, F b) { HALFBIT_EACH(F, a.v[i] - b.v[i]); }
inline F mul(F a, F b) { HALFBIT_EACH(F, a.v[i] * b.v[i]); }
inline F fma(F a, F b, F c) { HALFBIT_EACH(F, a.v[i] * b.v[i] + c.v[i]); }
inline F round_to_half(F a) { HALFBIT_EACH(F, float_of(half_of(a.v[i]), false)); }
inline F widen(const uint16_t *p, bool bfloat) { HALFBIT_EACH(F, float_of(p[i], bfloat)); }
inline void narrow(uint16_t *p, F a, bool bfloat) {
    for (int i = 0; i < 16; ++i) p[i] = bfloat ? bfloat_of(a.v[i]) : half_of(a.v[i]);
}
inline W words(const uint32_t *p) { HALFBIT_EACH(W, p[i]); }
inline void store(uint32_t *p, W a) { std::memcpy(p, a.v, sizeof a.v); }
inline W either(W a, W b) { HALFBIT_EACH(W, a.v[i] | b.v[i]); }
template <int N> inline W right(W a) { HALFBIT_EACH(W, a.v[i] >> N); }
template <int N> inline W left(W a) { HALFBIT_EACH(W, a.v[i] << N); }
inline W lowest(W a, uint32_t mask) { HALFBIT_EACH(W, a.v[i] & mask); }
#undef HALFBIT_EACH

// Sixteen words of each of sixteen lines, from `offset` bytes on: to [16 words, 16 lanes].
inline void transpose(const uint8_t *const *lines, int64_t offset, uint32_t *to) {
    for (int word = 0; word < 16; ++word)
        for (int lane = 0; lane < 16; ++lane) std::memcpy(to + 16 * word + lane, lines[lane] + offset + 4 * word, 4);
}

#endif
