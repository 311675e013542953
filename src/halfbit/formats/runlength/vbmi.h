// Steps in registers, AVX-512 with VBMI and VBMI2: 32 states of 16 bits are one vector, the table is bytes in vectors.
//
// A step waits some 45 cycles for its own results and keeps the core busy for a third of that, so two tiles go abreast, and
// what was decoded before is added up meanwhile. Included inside a namespace and between target pragmas; no include guard.

// Narrow: symbols are below 64, so one vector has what belongs to them.
template <bool Narrow>
struct Registers {
    __m512i symbols[4], slots_of[2], first[2], gaps, skip;

    explicit Registers(const Table &table) {
        for (int i = 0; i < 4; ++i) symbols[i] = _mm512_load_si512(table.symbol + 64 * i);
        for (int i = 0; i < 2; ++i) slots_of[i] = _mm512_load_si512(table.slots_of + 64 * i);
        for (int i = 0; i < 2; ++i) first[i] = _mm512_load_si512(table.first + 64 * i);
        gaps = _mm512_set1_epi16(static_cast<short>(2 * table.gaps));
        skip = _mm512_set1_epi16(static_cast<short>(table.skip));
    }
};

// Positions and lengths are doubled, so that a sign finds room below.
struct Walk {
    __m512i state, position, length;
    __mmask32 live;
    const uint8_t *at;

    explicit Walk(const Job &job)
        : state(_mm512_load_si512(job.states.state)), position(_mm512_load_si512(job.states.position)),
          length(_mm512_slli_epi16(_mm512_loadu_si512(job.tile.length), 1)),
          live(_mm512_cmplt_epu16_mask(position, length)), at(job.bytes.at) {}

    void end(Job &job) const {
        job.bytes.at = at;
        _mm512_store_si512(job.states.state, state);
        _mm512_store_si512(job.states.position, position);
        job.more = live != 0;
    }

    // Before some steps, which take at most 32 bytes each: whether there are any left, and what will be read next.
    template <int Steps>
    [[gnu::always_inline]] void look(const Job &job) const {
        static_assert(32 * Steps + 32 <= spare);
        if (at > job.bytes.end) job.bytes.damaged();
        for (int byte = 0; byte < 32 * Steps; byte += 64)
            _mm_prefetch(reinterpret_cast<const char *>(at + job.ahead + byte), _MM_HINT_T0);
    }

    // One step to `index` [32]; of steps whose lanes have no weights left nothing but zeros.
    template <bool Narrow>
    [[gnu::always_inline]] void step(const Registers<Narrow> &table, __m512i spread, uint16_t *index) {
        const __m512i one = _mm512_set1_epi16(1);
        // bytes that are looked up are the low ones of 16 bits, bytes that follow the high ones
        constexpr __mmask64 even = 0x5555555555555555;
        const __m512i next = _mm512_maskz_permutexvar_epi8(~even, spread, _mm512_loadu_si512(at));
        const __m512i symbol = _mm512_mask_blend_epi8(
            _mm512_movepi8_mask(state), _mm512_maskz_permutex2var_epi8(even, table.symbols[0], state, table.symbols[1]),
            _mm512_maskz_permutex2var_epi8(even, table.symbols[2], state, table.symbols[3]));
        // slots * (state / 256) + state % 256 - first
        __m512i after;
        if constexpr (Narrow) {
            const __m512i slots = _mm512_permutexvar_epi8(symbol, table.slots_of[0]);
            const __m512i first = _mm512_maskz_permutexvar_epi8(even, symbol, table.first[0]);
            const __m512i factors = _mm512_shldi_epi16(slots, _mm512_set1_epi16(256), 8);  // 1, slots: those are below 128
            after = _mm512_sub_epi16(_mm512_maddubs_epi16(state, factors), first);
        } else {
            const __m512i slots = _mm512_maskz_permutex2var_epi8(even, table.slots_of[0], symbol, table.slots_of[1]);
            const __m512i first = _mm512_maskz_permutex2var_epi8(even, table.first[0], symbol, table.first[1]);
            const __m512i number = _mm512_sub_epi16(_mm512_and_si512(state, _mm512_set1_epi16(255)), first);
            after = _mm512_add_epi16(_mm512_mullo_epi16(slots, _mm512_srli_epi16(state, 8)), number);
        }
        const __mmask32 takes = _mm512_mask_cmple_epu16_mask(live, after, _mm512_set1_epi16(255));
        state = _mm512_mask_mov_epi16(state, live, after);
        state = _mm512_mask_shldi_epi16(state, takes, state, _mm512_maskz_expand_epi16(takes, next), 8);
        at += __builtin_popcount(takes);

        const __mmask32 gap = _mm512_mask_cmpneq_epi16_mask(live, symbol, table.skip);
        const __m512i weights = _mm512_mask_add_epi16(table.gaps, gap, _mm512_or_si512(symbol, one), one);
        position = _mm512_mask_add_epi16(position, live, position, weights);
        const __mmask32 hits = _mm512_mask_cmple_epu16_mask(gap, position, length);
        _mm512_store_si512(index, _mm512_maskz_mov_epi16(hits, _mm512_ternarylogic_epi32(position, symbol, one, 0xf8)));
        live = _mm512_cmplt_epu16_mask(position, length);
    }
};

// Where bytes 0 to 31 go: the high ones of 16 bits.
inline __m512i spread() {
    alignas(64) uint8_t numbers[64] = {};
    for (int i = 0; i < 32; ++i) numbers[2 * i + 1] = static_cast<uint8_t>(i);
    return _mm512_load_si512(numbers);
}

template <bool Narrow>
void next_of(Job *jobs, int count) {
    for (int i = 0; i < count; ++i) jobs[i].steps.count = 0;
    const __m512i spread = avx512::spread();
    const auto step = [&](Walk &walk, const Registers<Narrow> &table, Job &job) {
        walk.look<1>(job);
        walk.step(table, spread, job.steps.index + job.steps.count++ * lanes_of_tile);
    };
    if (count == 2) {
        Walk walks[2] = {Walk(jobs[0]), Walk(jobs[1])};
        const Registers<Narrow> table(*jobs[0].table), other(*jobs[1].table);
        for (int64_t done = 0; done < steps_at_once && walks[0].live && walks[1].live; ++done) {
            step(walks[0], table, jobs[0]);
            step(walks[1], other, jobs[1]);
        }
        for (int i = 0; i < 2; ++i) walks[i].end(jobs[i]);
    }
    for (int i = 0; i < count; ++i) {
        if (!jobs[i].more || jobs[i].steps.count == steps_at_once) continue;
        Walk walk(jobs[i]);
        const Registers<Narrow> table(*jobs[i].table);
        while (jobs[i].steps.count < steps_at_once && walk.live) step(walk, table, jobs[i]);
        walk.end(jobs[i]);
    }
}

inline void next_in_registers(Job *jobs, int count) {
    if (jobs[0].table->narrow() && jobs[count - 1].table->narrow()) next_of<true>(jobs, count);
    else next_of<false>(jobs, count);
}

// While sixteen steps of both tiles are decoded, the sixteen before them are added up, four lanes at each step.
template <bool Narrow>
void add_of(Job *jobs, const int64_t *x, int64_t *sums) {
    constexpr int at_once = 16;
    alignas(64) uint16_t index[2][2][at_once * lanes_of_tile];  // of both halves both tiles
    std::memset(index[1], 0, sizeof index[1]);
    Walk walks[2] = {Walk(jobs[0]), Walk(jobs[1])};
    const Registers<Narrow> table(*jobs[0].table), other(*jobs[1].table);
    const __m512i spread = avx512::spread();
    int half = 0;
    for (bool more = true; more; half = 1 - half) {
        more = walks[0].live || walks[1].live;
        walks[0].look<at_once>(jobs[0]);
        walks[1].look<at_once>(jobs[1]);
        for (int step = 0; step < at_once; ++step) {
            walks[0].step(table, spread, index[half][0] + step * lanes_of_tile);
            walks[1].step(other, spread, index[half][1] + step * lanes_of_tile);
            add_four<at_once>(index[1 - half][step / 8] + step % 8 * 4, x, sums + step * 4);
        }
    }
    for (int i = 0; i < 2; ++i) walks[i].end(jobs[i]);
}

inline void add_in_registers(Job *jobs, const int64_t *x, int64_t *sums) {
    if (jobs[0].table->narrow() && jobs[1].table->narrow()) add_of<true>(jobs, x, sums);
    else add_of<false>(jobs, x, sums);
}
