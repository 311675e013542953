// Rounding a strip of rows, some columns one after another, in whatever instructions are allowed.
//
// Included once for each kind of instructions, inside a namespace and between target pragmas; no include guard. Before it:
//   HALFBIT_VECTOR   bytes of a vector
//   HALFBIT_WIDTH    columns whose sums are in registers together, `width`
//   HALFBIT_VECTORS  vectors of rows of these columns
//   fma(a, b, c)     of three vectors, rounded once
// Results do not depend on these: each sum is added up in the order of the columns.

typedef int32_t Words __attribute__((vector_size(HALFBIT_VECTOR)));
typedef uint8_t Bytes __attribute__((vector_size(HALFBIT_VECTOR / 4)));
using Lanes = std::make_integer_sequence<int, HALFBIT_VECTOR / 4>;

constexpr int lanes = HALFBIT_VECTOR / 4, width = HALFBIT_WIDTH, vectors = HALFBIT_VECTORS;
static_assert(rows_of_strip % (lanes * vectors) == 0 && most_columns % width == 0 && columns_of_product % width == 0);

[[gnu::always_inline]] inline F load(const float *p) { return *reinterpret_cast<const F *>(p); }
[[gnu::always_inline]] inline void store(float *p, F a) { *reinterpret_cast<F *>(p) = a; }
[[gnu::always_inline]] inline F all(float a) { return a - F{}; }
[[gnu::always_inline]] inline Words bits(F a) { return reinterpret_cast<Words>(a); }
[[gnu::always_inline]] inline F floats(Words a) { return reinterpret_cast<F>(a); }

// ---------------------------------------------------------------------------------------------------------- rows to columns

// Of two rows, what belongs together after a step of `Distance`: a transposition is log2(lanes) such steps.
template <int Distance, int... Lane>
[[gnu::always_inline]] inline void exchange(Words &a, Words &b, std::integer_sequence<int, Lane...>) {
    const Words first = __builtin_shufflevector(a, b, (Lane & Distance ? lanes + Lane - Distance : Lane)...);
    b = __builtin_shufflevector(a, b, (Lane & Distance ? lanes + Lane : Lane + Distance)...);
    a = first;
}

template <int Distance = lanes / 2>
[[gnu::always_inline]] inline void transpose(Words (&rows)[lanes]) {
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i)
        if (!(i & Distance)) exchange<Distance>(rows[i], rows[i + Distance], Lanes());
    if constexpr (Distance > 1) transpose<Distance / 2>(rows);
}

// [rows, columns] of words, `stride` words from row to row -> [columns, rows_of_strip]. Behind the last row and the last
// column there may be anything, up to whole vectors.
inline void read_rows(const float *from, int64_t stride, int rows, int columns, float (*to)[rows_of_strip]) {
    for (int row = 0; row < rows; row += lanes)
        for (int column = 0; column < columns; column += lanes) {
            Words block[lanes] = {};
            const int bytes = 4 * std::min(lanes, columns - column), count = std::min(lanes, rows - row);
            const float *p = from + row * stride + column;
            if (bytes == HALFBIT_VECTOR && count == lanes) {
#pragma GCC unroll 16
                for (int i = 0; i < lanes; ++i) std::memcpy(&block[i], p + i * stride, HALFBIT_VECTOR);
            } else {
                for (int i = 0; i < count; ++i) std::memcpy(&block[i], p + i * stride, bytes);
            }
            transpose(block);
#pragma GCC unroll 16
            for (int i = 0; i < lanes; ++i) std::memcpy(to[column + i] + row, &block[i], HALFBIT_VECTOR);
        }
}

// [columns / 4, rows_of_strip] of words, each the codes of four columns -> [rows, columns] of bytes, `stride` from row to row.
inline void write_rows(const uint32_t (*from)[rows_of_strip], int64_t stride, int rows, int columns, uint8_t *to) {
    for (int row = 0; row < rows; row += lanes)
        for (int column = 0; column < columns; column += 4 * lanes) {
            Words block[lanes];
#pragma GCC unroll 16
            for (int i = 0; i < lanes; ++i) std::memcpy(&block[i], from[column / 4 + i] + row, HALFBIT_VECTOR);
            transpose(block);
            const int bytes = std::min(4 * lanes, columns - column), count = std::min(lanes, rows - row);
            uint8_t *p = to + row * stride + column;
            if (bytes == HALFBIT_VECTOR && count == lanes) {
#pragma GCC unroll 16
                for (int i = 0; i < lanes; ++i) std::memcpy(p + i * stride, &block[i], HALFBIT_VECTOR);
            } else {
                for (int i = 0; i < count; ++i) std::memcpy(p + i * stride, &block[i], bytes);
            }
        }
}

// ------------------------------------------------------------------------------------------------------------------ grids

// What a weight becomes: its code and the value of that.
struct Rounded {
    Words code;
    F value;
};

// Three values, codes 0 to 2: 0, low, high.
struct ByLevels {
    F below, above, low, high;

    ByLevels(const float (*numbers)[rows_of_strip], int row, float)
        : below(load(numbers[0] + row)), above(load(numbers[1] + row)), low(load(numbers[2] + row)), high(load(numbers[3] + row)) {}

    [[gnu::always_inline]] Rounded operator()(F w) const {
        const Words is_low = w < below, is_high = w > above;
        return {(is_low & 1) | (is_high & 2), floats((is_low & bits(low)) | (is_high & bits(high)))};
    }
};

// Equal steps, codes 0 to the largest.
struct BySteps {
    F step, before, after, shift, least, most;

    BySteps(const float (*numbers)[rows_of_strip], int row, float largest)
        : step(load(numbers[0] + row)), before(load(numbers[1] + row)), after(load(numbers[2] + row)), shift(before + after),
          least(-after), most(all(largest) - after) {}

    [[gnu::always_inline]] Rounded operator()(F w) const {
        F code = w / step + before;
        // NaN becomes the least; whole limits, so that it does not matter that rounding comes after them
        code = code > least ? code : least;
        code = code < most ? code : most;
        // to the nearest, ties to even, as numbers of this size have no bits behind the point
        constexpr float whole = 0x1.8p23f;
        code = (code + whole) - whole + after;
        return {__builtin_convertvector(code, Words), step * (code - shift)};
    }
};

// To the nearest number of 16 bits, ties to even; infinite where it is too large.
[[gnu::always_inline]] inline F to_16_bits(F w, Kept kept) {
    const Words sign = bits(w) & INT32_MIN, magnitude = bits(w) & INT32_MAX;
    if (kept == Kept::bfloat16) return floats((bits(w) + (magnitude >> 16 & 1) + 0x7FFF) & static_cast<int32_t>(0xFFFF0000));
    if (kept == Kept::float32) return w;
    const F size = floats(magnitude), normal = floats((magnitude + (magnitude >> 13 & 1) + 0xFFF) & ~0x1FFF);
    // below 2^-14 they are multiples of 2^-24, as are sums with 0.5
    const F small = (size + 0.5f) - 0.5f, rounded = size < 0x1p-14f ? small : normal;
    return floats(sign | bits(size >= 65520.0f ? all(INFINITY) : rounded));
}

// ----------------------------------------------------------------------------------------------------------------- columns

// `width` columns are told what `count` others, which are done, want of them: a product of matrices whose sums are in
// registers, of as many rows as there are in some vectors; all loops but that over the columns that are done are unrolled.
[[gnu::always_inline]] inline void add_wanted(const float (*errors)[rows_of_strip], int count, int row, const float *feedback,
                                              F (&sum)[width][vectors]) {
    for (int k = 0; k < count; ++k) {
        F error[vectors];
        for (int v = 0; v < vectors; ++v) error[v] = load(errors[k] + row + lanes * v);
        for (int c = 0; c < width; ++c) {
            const F wanted = all(feedback[k * width + c]);
            for (int v = 0; v < vectors; ++v) sum[c][v] = fma(error[v], wanted, sum[c][v]);
        }
    }
}

inline void tell_some(const float (*errors)[rows_of_strip], int rows, const float *feedback, float (*fed)[rows_of_strip]) {
    for (int row = 0; row < rows; row += lanes * vectors) {
        F sum[width][vectors];
        for (int c = 0; c < width; ++c)
            for (int v = 0; v < vectors; ++v) sum[c][v] = load(fed[c] + row + lanes * v);
        add_wanted(errors, columns_of_product, row, feedback, sum);
        for (int c = 0; c < width; ++c)
            for (int v = 0; v < vectors; ++v) store(fed[c] + row + lanes * v, sum[c][v]);
    }
}

// `width` columns of a chunk from `first` on; those before the chunk are made up for, those in it are done.
template <class Rule, bool Outlying>
void round_some(Strip &strip, const Job &job, int rows, int chunk, int first, const float *feedback) {
    float(*fed)[rows_of_strip] = strip.fed + chunk;
    for (int row = 0; row < rows; row += lanes * vectors) {
        F sum[width][vectors];
        for (int c = 0; c < width; ++c)
            for (int v = 0; v < vectors; ++v) sum[c][v] = load(fed[first + c] + row + lanes * v);
        add_wanted(fed, first, row, feedback, sum);
        Words codes[vectors];
#pragma GCC unroll 8
        for (int c = 0; c < width; ++c) {
            const int column = first + c;
#pragma GCC unroll 8
            for (int v = 0; v < vectors; ++v) {
                const int at = row + lanes * v;
                const F w = load(strip.w[column] + at), whole = w + sum[c][v];
                Rounded to = Rule(strip.numbers, at, job.largest)(whole);
                if constexpr (Outlying) {
                    const F away = whole - to.value, kept = to_16_bits(whole, job.kept);
                    const Words far = (away * away * all(strip.importance[chunk + column]) > all(strip.limit)) &
                                      ((bits(kept) & INT32_MAX) < 0x7F800000);
                    to = {to.code & ~far, far ? kept : to.value};
                    store(strip.w[column] + at, whole);
                    *reinterpret_cast<Bytes *>(strip.far[column] + at) = __builtin_convertvector(far & 1, Bytes);
                }
                sum[c][v] = w - to.value;
                store(fed[column] + at, sum[c][v]);
                codes[v] = c % 4 ? codes[v] | to.code << 8 * (c % 4) : to.code;
                if (c % 4 == 3) std::memcpy(strip.codes[column / 4] + at, &codes[v], HALFBIT_VECTOR);
            }
#pragma GCC unroll 8
            for (int later = c + 1; later < width; ++later) {
                const F wanted = all(feedback[column * width + later]);
#pragma GCC unroll 8
                for (int v = 0; v < vectors; ++v) sum[later][v] = fma(sum[c][v], wanted, sum[later][v]);
            }
        }
    }
}

template <class Rule, bool Outlying>
void round_all(Strip &strip, const Job &job, int rows, int chunk, int count, const float *feedback) {
    for (int first = 0; first < count; first += width) {
        round_some<Rule, Outlying>(strip, job, rows, chunk, first, feedback);
        feedback += (first + width) * width;
    }
}

// All columns of a chunk, `count`.
inline void round_chunk(Strip &strip, const Job &job, int rows, int chunk, int count, const float *feedback) {
    const bool outlying = job.outlying != nullptr;
    const auto round = job.form == Form::levels ? outlying ? round_all<ByLevels, true> : round_all<ByLevels, false>
                                                : outlying ? round_all<BySteps, true> : round_all<BySteps, false>;
    round(strip, job, rows, chunk, count, feedback);
}

// Part `part` of `parts` of what a chunk begins with, into the second-level cache: rows of weights and codes, columns of what
// is fed. They lie in other pages, which the processor does not foresee.
inline void fetch(const Job &job, int64_t expert, int64_t row, int64_t column, int part, int parts) {
    constexpr int64_t line = 64;
    if (row >= job.rows) return;
    const int64_t columns = std::min<int64_t>(columns_of_chunk, job.stop - column);
    for (int64_t r = part * rows_of_strip / parts; r < (part + 1) * rows_of_strip / parts; ++r) {
        const int64_t place = (expert * job.rows + row + r) * job.columns + column;
        for (int64_t c = 0; c < columns; c += line / 4) __builtin_prefetch(job.w + place + c, 0, 2);
        for (int64_t c = 0; c < columns; c += line) __builtin_prefetch(job.codes + place + c, 1, 2);
    }
    for (int64_t c = part * columns / parts; c < (part + 1) * columns / parts; ++c)
        for (int r = 0; r < rows_of_strip; r += line / 4)
            __builtin_prefetch(job.fed + (expert * job.columns + column + c) * job.rows + row + r, 1, 2);
}

// `count` rows from `row` on.
inline void round_rows(Strip &strip, const Job &job, int64_t expert, int64_t row, int count, const float *feedback) {
    const int columns = static_cast<int>(job.stop - job.start);
    for (int i = 0; i < 4; ++i) std::copy_n(job.numbers + (4 * expert + i) * job.rows + row, count, strip.numbers[i]);
    for (int chunk = 0; chunk < columns; chunk += columns_of_chunk) {
        const int own = std::min(columns_of_chunk, columns - chunk);
        const int64_t at = (expert * job.rows + row) * job.columns + job.start + chunk;
        float *fed = job.fed + (expert * job.columns + job.start + chunk) * job.rows + row;
        const auto each = [&](const auto &copy) {
            for (int c = 0; c < own; ++c) copy(strip.fed[chunk + c], fed + c * job.rows);
        };
        read_rows(job.w + at, job.columns, count, own, strip.w);
        if (count == rows_of_strip) each([](float *own, const float *all) { std::memcpy(own, all, 4 * rows_of_strip); });
        else each([=](float *own, const float *all) { std::copy_n(all, count, own); });
        // the next chunk, or the first of the next strip
        const bool last = chunk + own == columns;
        const int64_t next_row = last ? row + rows_of_strip : row, next_column = job.start + (last ? 0 : chunk + own);
        const int parts = std::max(1, chunk / columns_of_product);
        if (chunk == 0) fetch(job, expert, next_row, next_column, 0, 1);
        for (int done = 0; done < chunk; done += columns_of_product) {
            fetch(job, expert, next_row, next_column, done / columns_of_product, parts);
            for (int first = 0; first < own; first += width) {
                tell_some(strip.fed + done, count, feedback, strip.fed + chunk + first);
                feedback += columns_of_product * width;
            }
        }
        round_chunk(strip, job, count, chunk, own, feedback);
        feedback += sums_of(own, width);
        if (count == rows_of_strip) each([](const float *own, float *all) { std::memcpy(all, own, 4 * rows_of_strip); });
        else each([=](const float *own, float *all) { std::copy_n(own, count, all); });
        write_rows(strip.codes, job.columns, count, own, job.codes + at);
        if (job.outlying) strip.write_outliers(job, at, own, count);
    }
}
