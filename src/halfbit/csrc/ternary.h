// Ternary matrices times any number of tokens: the non-zeros of a row as lists of columns, one for each of the two codes.
//
// A product adds up the x of the columns of a list and multiplies two sums with the two levels of the row. Tokens lie side
// by side in vectors, so that one column of a list adds up to 32 of them. Columns are cut into chunks of 256: x of a chunk
// and 32 tokens is 32 KiB, and stays in the first-level cache for all rows. Rows are decoded to lists once for all tokens.
//
//   x [chunks, panels, 257, tokens of a panel]    column 256 is zero: lists are filled up with it to whole fours
//
// The work follows the non-zeros: at 88 % zeros it is an eighth of a dense product's. x must be finite.
#pragma once

#include <cstdint>
#include <vector>

namespace halfbit::ternary {

constexpr int64_t chunk_columns = 256;

// The non-zeros of some rows. Accumulates.
class Lists {
public:
    Lists(int64_t rows, int64_t columns);

    // All non-zeros of a row: 2 * column + (code 1: 0, code 2: 1), rising, counted from `base`. What lies behind the last
    // column is not taken; returns where that begins.
    const uint32_t *add(int64_t row, const uint32_t *entry, const uint32_t *end, uint32_t base = 0);

    // The same of one chunk: `minuses` columns of code 1 and `pluses` of code 2, counted from the chunk's first, in any
    // order; 16 bytes behind either may be read.
    void add(int64_t row, int64_t chunk, const uint8_t *minus, int64_t minuses, const uint8_t *plus, int64_t pluses);

    // Of a row and a chunk: where the lists of code 1 and of code 2 begin, and where the second ends.
    struct Place {
        uint32_t minus, plus, end;
    };
    const uint16_t *columns() const { return store.data(); }
    const Place *places(int64_t chunk) const { return found.data() + chunk * rows; }

    const int64_t rows, width, chunks;

private:
    std::vector<uint16_t> store;
    std::vector<Place> found;  // [chunks, rows]
    int64_t used = 0;
};

// How a format hands out its rows.
class Source {
public:
    virtual ~Source() = default;
    // Rows of a matrix that are decoded together; ranges begin at multiples of it.
    virtual int64_t height(int64_t matrix) const = 0;
    // Rows `first` to `last` of a matrix, the first of them row 0 of the lists.
    virtual void decode(int64_t matrix, int64_t first, int64_t last, Lists &lists) const = 0;
};

// Tokens of x and the matrix that they multiply.
struct Group {
    int64_t matrix, first, tokens;
};

// x [., columns] times the matrices of the groups -> y [., out]. Levels of codes 1 and 2 of row r of matrix m are at
// `levels + (m * out + r) * step`.
void product(const Source &source, const std::vector<Group> &groups, const float *x, int64_t columns, const float *levels,
             int64_t step, float *y, int64_t out, int threads);

}  // namespace halfbit::ternary
