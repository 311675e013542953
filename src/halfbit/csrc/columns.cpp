// Rounding some columns of weights one after another, with what each wants of the next: the inner part of `solve/gptq.py`,
// which `solve/columns.py` has in plain torch.
//
// Rows do not know of each other, so a strip of 32 rows is taken through all the columns, in the first-level cache: its
// weights are turned on the way in and its codes on the way out, since a column is a vector here and a row is a row in
// memory. Of some columns at a time, the errors of all columns before them are multiplied from registers, as in a product
// of matrices; then these columns are rounded, one after another.
//
// Multiplications and additions are fused where errors are fed back, and nowhere else: this file is compiled with
// contraction off, so that rounding is what the grids do.

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
#include <tuple>
#include <utility>

#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include "extension.h"
#include "isa.h"
#include "parallel.h"
#include "tensors.h"

#ifdef HALFBIT_X86
#include <immintrin.h>
#endif

namespace nb = nanobind;
using namespace nb::literals;
using halfbit::array;
using halfbit::Isa;

namespace {

constexpr int rows_of_strip = 32, most_columns = 256;
// of one expert that one thread takes at a time; what is fed back is laid out anew for each
constexpr int64_t rows_of_item = 1024;

enum class Form { levels, steps };
enum class Kept { float16, bfloat16, float32 };

struct Job {
    int64_t experts, rows, columns, start, stop;
    const float *w;         // [experts, rows, columns]
    float *fed;             // [experts, columns, rows]
    uint8_t *codes;         // [experts, rows, columns]
    const float *feedback;  // [experts, columns, columns]
    Form form;
    const float *numbers;  // [experts, 4, rows]
    float largest;
    // none, or all of them
    const float *importance;   // [experts, columns]
    const float *limit;        // [experts]
    float *values;             // [experts, rows, columns]
    bool *outlying;            // [experts, rows, columns]
    Kept kept;
};

struct Strip {
    alignas(64) float numbers[4][rows_of_strip];
    alignas(64) float w[most_columns][rows_of_strip];    // what it was when it was rounded, where outliers are looked for
    alignas(64) float fed[most_columns][rows_of_strip];  // what the columns before want; of one that is done, its error
    alignas(64) uint32_t codes[most_columns / 4][rows_of_strip];  // of four columns each
    alignas(64) uint8_t far[most_columns][rows_of_strip];
    float importance[most_columns];
    float limit;

    // They are few.
    void write_outliers(const Job &job, int64_t at, int rows) const {
        for (int64_t c = 0; c < job.stop - job.start; ++c) {
            if (std::none_of(far[c], far[c] + rows, [](uint8_t yes) { return yes; })) continue;
            for (int64_t r = 0; r < rows; ++r) {
                if (!far[c][r]) continue;
                job.outlying[at + r * job.columns + c] = true;
                job.values[at + r * job.columns + c] = w[c][r];
            }
        }
    }
};

// `feedback`: for each `width` columns what they are wanted of those before them and by each other, [before + width, width].
struct Kernel {
    int width;
    void (*round_rows)(Strip &strip, const Job &job, int64_t expert, int64_t row, int count, const float *feedback);
};

namespace portable {
#define HALFBIT_VECTOR 16
#define HALFBIT_WIDTH 4
typedef float F __attribute__((vector_size(HALFBIT_VECTOR)));
inline F fma(F a, F b, F c) {
    for (int i = 0; i < 4; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
}
#include "columns.h"
#undef HALFBIT_VECTOR
#undef HALFBIT_WIDTH
}  // namespace portable

#ifdef HALFBIT_X86
HALFBIT_TARGET("avx2,fma")
namespace avx2 {
#define HALFBIT_VECTOR 32
#define HALFBIT_WIDTH 4
typedef float F __attribute__((vector_size(HALFBIT_VECTOR)));
[[gnu::always_inline]] inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
#include "columns.h"
#undef HALFBIT_VECTOR
#undef HALFBIT_WIDTH
}  // namespace avx2
HALFBIT_TARGET_END

HALFBIT_TARGET("avx512f,avx2,fma")
namespace avx512 {
#define HALFBIT_VECTOR 64
#define HALFBIT_WIDTH 8
typedef float F __attribute__((vector_size(HALFBIT_VECTOR)));
[[gnu::always_inline]] inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
#include "columns.h"
#undef HALFBIT_VECTOR
#undef HALFBIT_WIDTH
}  // namespace avx512
HALFBIT_TARGET_END
#endif

Kernel kernel() {
#ifdef HALFBIT_X86
    const Isa isa = halfbit::active_isa.load();
    if (isa >= Isa::avx512) return {avx512::width, avx512::round_rows};
    if (isa >= Isa::avx2) return {avx2::width, avx2::round_rows};
#endif
    return {portable::width, portable::round_rows};
}

void round_columns(const Job &job, int threads) {
    const Kernel k = kernel();
    const int64_t count = job.stop - job.start, items = (job.rows + rows_of_item - 1) / rows_of_item;
    halfbit::parallel(threads, job.experts * items, [&](int64_t item) {
        const int64_t expert = item / items, first = item % items * rows_of_item, last = std::min(first + rows_of_item, job.rows);
        const auto strip = std::make_unique<Strip>();
        if (job.outlying) {
            std::copy_n(job.importance + expert * job.columns + job.start, count, strip->importance);
            strip->limit = job.limit[expert];
        }
        const auto feedback = std::make_unique<float[]>((most_columns + k.width) * most_columns / 2 + most_columns);
        float *to = feedback.get();
        for (int64_t c = 0; c < count; c += k.width)
            for (int64_t before = 0; before < c + k.width; ++before)
                for (int64_t i = c; i < c + k.width; ++i)
                    *to++ = before < i && i < count
                                ? job.feedback[(expert * job.columns + job.start + before) * job.columns + job.start + i]
                                : 0.0f;
        for (int64_t row = first; row < last; row += rows_of_strip) {
            const int rows = static_cast<int>(std::min<int64_t>(rows_of_strip, last - row));
            k.round_rows(*strip, job, expert, row, rows, feedback.get());
        }
    });
}

Form form_of(const std::string &name) {
    if (name == "levels") return Form::levels;
    if (name == "steps") return Form::steps;
    throw std::invalid_argument("round_columns: form must be levels or steps, got " + name);
}

Kept kept_of(const std::string &name) {
    if (name == "float16") return Kept::float16;
    if (name == "bfloat16") return Kept::bfloat16;
    if (name == "float32") return Kept::float32;
    throw std::invalid_argument("round_columns: outliers are kept in float16, bfloat16 or float32, got " + name);
}

// Throws where a tensor is not [sizes].
template <class T, size_t N>
T *sized(nb::handle tensor, std::array<int64_t, N> sizes) {
    const auto a = array<T, N>(tensor);
    if (a.sizes != sizes) throw std::invalid_argument("round_columns: a tensor has another shape than the weights ask for");
    return a.data();
}

}  // namespace

HALFBIT_BINDINGS(columns) {
    m.def("round_columns", [](nb::handle w, nb::handle fed, nb::handle codes, nb::handle feedback, int64_t start, int64_t stop,
                              const std::string &form, nb::handle numbers, int largest, nb::object outliers, int threads) {
        const auto weights = array<const float, 3>(w);
        const auto [experts, rows, columns] = weights.sizes;
        if (start < 0 || stop < start || stop > columns || stop - start > most_columns)
            throw std::invalid_argument("round_columns: these are not columns of the weights, or too many at a time");
        Job job{experts, rows, columns, start, stop, weights.data(), sized<float, 3>(fed, {experts, columns, rows}),
                sized<uint8_t, 3>(codes, {experts, rows, columns}), sized<const float, 3>(feedback, {experts, columns, columns}),
                form_of(form), sized<const float, 3>(numbers, {experts, 4, rows}), static_cast<float>(largest),
                nullptr, nullptr, nullptr, nullptr, Kept::float32};
        if (!outliers.is_none()) {
            const auto [importance, limit, values, outlying, dtype] =
                nb::cast<std::tuple<nb::object, nb::object, nb::object, nb::object, std::string>>(outliers);
            job.importance = sized<const float, 2>(importance, {experts, columns});
            job.limit = sized<const float, 1>(limit, {experts});
            job.values = sized<float, 3>(values, {experts, rows, columns});
            job.outlying = reinterpret_cast<bool *>(sized<char, 3>(outlying, {experts, rows, columns}));
            job.kept = kept_of(dtype);
        }
        const nb::gil_scoped_release release;
        round_columns(job, threads);
    }, "w"_a, "fed"_a, "codes"_a, "feedback"_a, "start"_a, "stop"_a, "form"_a, "numbers"_a, "largest"_a, "outliers"_a.none(),
          "threads"_a, "See solve/columns.py.");
}
