// Decode some steps of a tile into a buffer, and multiply what is in the buffer: in whatever instructions are allowed.
//
// Included once for each kind of instructions, inside a namespace and between target pragmas; no include guard.

inline void next(Job &job) {
    const Tile &tile = job.tile;
    const Table &table = *job.table;
    States &states = job.states;
    const uint8_t *at = job.bytes.at;
    bool more = true;
    int64_t step = 0;
    for (; step < steps_at_once && more; ++step) {
        if (at > job.bytes.end) job.bytes.damaged();
        more = false;
        uint16_t *index = job.steps.index + step * lanes_of_tile;
        std::fill_n(index, lanes_of_tile, uint16_t{0});
        for (int lane = 0; lane < tile.lanes; ++lane) {
            const uint32_t length = 2 * tile.length[lane];
            uint32_t position = states.position[lane];
            if (position >= length) continue;
            const uint32_t state = states.state[lane], entry = table.entries[state & 255], byte = *at;
            const uint32_t after = slots(entry) * (state >> 8) + number(entry);
            // without branches: whether a byte is taken is nobody's guess
            const uint32_t takes = (after - lowest) >> 31;
            at += takes;
            states.state[lane] = static_cast<uint16_t>(after << (8 * takes) | (byte & (0 - takes)));
            const uint32_t sign = entry >> 25;
            position += entry >> 15 & 254;
            states.position[lane] = static_cast<uint16_t>(position);
            index[lane] = static_cast<uint16_t>((position + sign) & (0 - (entry >> 24 != 0)));
            if (position < length) more = true;
            else if (position > length) index[lane] = 0;
        }
    }
    job.steps.count = step;
    job.bytes.at = at;
    job.more = more;
}

inline void next(Job *jobs, int count) {
    for (int i = 0; i < count; ++i) {
        jobs[i].steps.count = 0;
        if (jobs[i].more) next(jobs[i]);
    }
}

// As `Multiply`, where a lane is a part of a row. L lanes go abreast, so that their additions need not wait for each other.
template <int W, int L>
void multiply_parts(const Steps &steps, const Tile &tile, const float *levels, const float *x, float *sums) {
    using V = typename Vector<W>::type;
    for (int lane = 0; lane < tile.lanes; lane += L) {
        V sum[L] = {};
        for (int64_t step = 0; step < steps.count; ++step)
            for (int i = 0; i < L; ++i) {
                const uint32_t index = steps.index[step * lanes_of_tile + lane + i];
                sum[i] += levels[2 * (lane + i) + index % 2] * *reinterpret_cast<const V *>(x + int64_t{index / 2} * W);
            }
        for (int i = 0; i < std::min(L, tile.lanes - lane); ++i) *reinterpret_cast<V *>(sums + (lane + i) * W) += sum[i];
    }
}

// As `Multiply`, where a lane is several rows.
template <int W>
void multiply_rows(const Steps &steps, const Tile &tile, const float *levels, const float *x, int64_t columns, float *sums) {
    using V = typename Vector<W>::type;
    for (int lane = 0; lane < tile.lanes; ++lane) {
        const uint16_t *index = steps.index + lane, *last = index + (steps.count - 1) * lanes_of_tile;
        while (index <= last) {
            // the row of the first non-zero that is left
            if (!*index) {
                index += lanes_of_tile;
                continue;
            }
            const int64_t of_lane = (*index / 2 - 1) / columns, before = of_lane * columns, row = lane * tile.height + of_lane;
            const uint32_t end = static_cast<uint32_t>(2 * (before + columns) + 1);
            V sum = {};
            for (; index <= last && *index <= end; index += lanes_of_tile) {
                const int64_t column = *index ? *index / 2 - before : 0;
                sum += levels[2 * row + *index % 2] * *reinterpret_cast<const V *>(x + column * W);
            }
            *reinterpret_cast<V *>(sums + row * W) += sum;
        }
    }
}

template <int W, int L>
void multiply(const Steps &steps, const Tile &tile, const float *levels, const float *x, int64_t columns, float *sums) {
    if (tile.height == 1) multiply_parts<W, L>(steps, tile, levels, x, sums);
    else multiply_rows<W>(steps, tile, levels, x, columns, sums);
}

// Some steps of four lanes beside each other. Places are fetched by one load, since loads are what it waits for.
template <int Steps>
[[gnu::always_inline]] inline void add_four(const uint16_t *index, const int64_t *x, int64_t *sums) {
    int64_t sum[4] = {sums[0], sums[1], sums[2], sums[3]};
HALFBIT_UNROLL(16)
    for (int step = 0; step < Steps; ++step, index += lanes_of_tile) {
        uint64_t four;
        std::memcpy(&four, index, sizeof four);
HALFBIT_UNROLL(3)
        for (int i = 0; i < 3; ++i) {
            sum[i] += x[four & 0xffff];
            four >>= 16;
            // numbers one by one, in registers: collecting them in vectors takes longer than adding them
            apart(four), apart(sum[i]);
        }
        sum[3] += x[four];
        apart(sum[3]);
    }
    for (int i = 0; i < 4; ++i) sums[i] = sum[i];
}

// As `Add`.
inline void add(Job *jobs, const int64_t *x, int64_t *sums) {
    for (int i = 0; i < 2; ++i)
        while (jobs[i].more) {
            next(jobs[i]);
            Steps &steps = jobs[i].steps;
            std::fill(steps.index + steps.count * lanes_of_tile, steps.index + steps_at_once * lanes_of_tile, uint16_t{0});
            for (int lane = 0; lane < lanes_of_tile; lane += 4)
                add_four<steps_at_once>(steps.index + lane, x, sums + i * lanes_of_tile + lane);
        }
}

inline float most(const float *x, int64_t count) {
    uint32_t greatest = 0;  // magnitudes are ordered as their bits are
    for (int64_t i = 0; i < count; ++i) {
        uint32_t bits;
        std::memcpy(&bits, x + i, sizeof bits);
        greatest = std::max(greatest, bits & 0x7fffffff);
    }
    float value;
    std::memcpy(&value, &greatest, sizeof value);
    return value;
}

inline void whole(const float *x, double scale, int64_t count, int64_t *to) {
    for (int64_t i = 0; i < count; ++i) {
        const int64_t number = static_cast<int64_t>(static_cast<double>(x[i]) * scale);
        to[2 * i] = -number, to[2 * i + 1] = number;
    }
}

inline std::vector<std::pair<int64_t, Multiply>> multiplications() {
    return {{1, multiply<1, 8>}, {4, multiply<4, 8>}, {8, multiply<8, 8>}, {16, multiply<16, 8>}, {32, multiply<32, 4>}};
}
