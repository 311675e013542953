// Rounding some columns of weights one after another, with what each wants of the next: the inner part of `solve/gptq.py`,
// which `solve/columns.py` has in plain torch.
//
// Rows do not know of each other, so a strip of 96 rows is taken through all the columns, in the second-level cache, by
// chunks of 128: its weights are turned on the way in and its codes on the way out, since a column is a vector here and a row
// is a row in memory. A chunk is first told what the chunks before it want, by 64 of their columns, whose errors stay in the
// first-level cache. Then of some columns at a time the errors of those before them in the chunk are multiplied, from
// registers, as in any product of matrices, and these columns are rounded, one after another.
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

constexpr int rows_of_strip = 96, columns_of_chunk = 128, columns_of_product = 64, most_columns = 1536;
static_assert(columns_of_chunk % columns_of_product == 0);
// of one expert that one thread takes at a time, at least; what is fed back is laid out anew for each
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

// Numbers that are fed back within `columns` columns of a chunk, each `width` by all before them and by each other.
constexpr int64_t sums_of(int64_t columns, int64_t width) {
    const int64_t blocks = (columns + width - 1) / width;
    return blocks * (blocks + 1) / 2 * width * width;
}

struct Strip {
    alignas(64) float numbers[4][rows_of_strip];
    alignas(64) float w[columns_of_chunk][rows_of_strip];  // what it was when it was rounded, where outliers are looked for
    alignas(64) float fed[most_columns][rows_of_strip];    // what the columns before want; of one that is done, its error
    alignas(64) uint32_t codes[columns_of_chunk / 4][rows_of_strip];  // of four columns each
    alignas(64) uint8_t far[columns_of_chunk][rows_of_strip];
    float importance[most_columns];
    float limit;

    // They are few.
    void write_outliers(const Job &job, int64_t at, int columns, int rows) const {
        for (int64_t c = 0; c < columns; ++c) {
            if (std::none_of(far[c], far[c] + rows, [](uint8_t yes) { return yes; })) continue;
            for (int64_t r = 0; r < rows; ++r) {
                if (!far[c][r]) continue;
                job.outlying[at + r * job.columns + c] = true;
                job.values[at + r * job.columns + c] = w[c][r];
            }
        }
    }
};

// `feedback`: for each chunk what it is to make up for of those before it, [before / columns_of_product, chunk / width,
// columns_of_product, width]; then for each `width` of its columns the same of those in the chunk before them and of each
// other, [before + width, width].
struct Kernel {
    int width;
    void (*round_rows)(Strip &strip, const Job &job, int64_t expert, int64_t row, int count, const float *feedback);
};

namespace portable {
#define HALFBIT_VECTOR 16
#define HALFBIT_WIDTH 4
#define HALFBIT_VECTORS 2
typedef float F __attribute__((vector_size(HALFBIT_VECTOR)));
inline F fma(F a, F b, F c) {
    for (int i = 0; i < 4; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
}
#include "columns.h"
#undef HALFBIT_VECTOR
#undef HALFBIT_WIDTH
#undef HALFBIT_VECTORS
}  // namespace portable

#ifdef HALFBIT_X86
HALFBIT_TARGET("avx2,fma")
namespace avx2 {
#define HALFBIT_VECTOR 32
#define HALFBIT_WIDTH 4
#define HALFBIT_VECTORS 2
typedef float F __attribute__((vector_size(HALFBIT_VECTOR)));
[[gnu::always_inline]] inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
#include "columns.h"
#undef HALFBIT_VECTOR
#undef HALFBIT_WIDTH
#undef HALFBIT_VECTORS
}  // namespace avx2
HALFBIT_TARGET_END

HALFBIT_TARGET("avx512f,avx2,fma")
namespace avx512 {
#define HALFBIT_VECTOR 64
#define HALFBIT_WIDTH 8
#define HALFBIT_VECTORS 3
typedef float F __attribute__((vector_size(HALFBIT_VECTOR)));
[[gnu::always_inline]] inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
#include "columns.h"
#undef HALFBIT_VECTOR
#undef HALFBIT_WIDTH
#undef HALFBIT_VECTORS
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

// What `Kernel` wants of one expert.
void lay_out(const Job &job, int64_t expert, int width, float *to) {
    const float *from = job.feedback + (expert * job.columns + job.start) * job.columns + job.start;
    const int64_t columns = job.stop - job.start;
    // of each row what some blocks of `width` columns of a chunk want, the blocks one after another
    const auto copy = [&](int64_t row, int64_t column, int64_t end, int64_t block, float *to) {
        for (; column < end; column += width, to += block * width)
            for (int64_t i = 0; i < width; ++i)
                to[i] = row < column + i && column + i < end ? from[row * job.columns + column + i] : 0.0f;
    };
    for (int64_t chunk = 0; chunk < columns; chunk += columns_of_chunk) {
        const int64_t end = std::min<int64_t>(chunk + columns_of_chunk, columns), blocks = (end - chunk + width - 1) / width;
        for (int64_t done = 0; done < chunk; done += columns_of_product, to += blocks * width * columns_of_product)
            for (int64_t k = 0; k < columns_of_product; ++k) copy(done + k, chunk, end, columns_of_product, to + k * width);
        for (int64_t column = chunk; column < end; column += width)
            for (int64_t k = chunk; k < column + width; ++k, to += width) copy(k, column, std::min(column + width, end), 0, to);
    }
}

void round_columns(const Job &job, int threads) {
    const Kernel k = kernel();
    const int64_t count = job.stop - job.start;
    int64_t size = 0;
    for (int64_t chunk = 0; chunk < count; chunk += columns_of_chunk) {
        const int64_t own = std::min<int64_t>(columns_of_chunk, count - chunk), blocks = (own + k.width - 1) / k.width;
        size += chunk * blocks * k.width + sums_of(own, k.width);
    }
    // some for each thread, where that does not make them small
    const int64_t most = std::max<int64_t>((job.rows + rows_of_item - 1) / rows_of_item, 1);
    const int64_t some = threads > 1 ? 4 * threads / std::max<int64_t>(job.experts, 1) + 1 : 1, items = std::min(most, some);
    const int64_t strips = (job.rows + rows_of_strip - 1) / rows_of_strip, each = (strips + items - 1) / items * rows_of_strip;
    halfbit::parallel(threads, job.experts * items, [&](int64_t item) {
        const int64_t expert = item / items, first = item % items * each, last = std::min(first + each, job.rows);
        const auto strip = std::make_unique<Strip>();
        if (job.outlying) {
            std::copy_n(job.importance + expert * job.columns + job.start, count, strip->importance);
            strip->limit = job.limit[expert];
        }
        const std::unique_ptr<float[]> feedback(new float[size]);
        lay_out(job, expert, k.width, feedback.get());
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
