// Steps in registers, AVX-512 with VBMI and VBMI2: 32 states of 16 bits are one vector, the table is bytes in vectors.
//
// A step waits some 40 cycles for its own results and keeps the core busy for a third of that, so two tiles go abreast.
// Included inside a namespace and between target pragmas; no include guard.

struct Registers {
    __m512i symbols[4], slots_of[2], first[2], gaps;

    explicit Registers(const Table &table) {
        for (int i = 0; i < 4; ++i) symbols[i] = _mm512_load_si512(table.symbol + 64 * i);
        for (int i = 0; i < 2; ++i) slots_of[i] = _mm512_load_si512(table.slots_of + 64 * i);
        for (int i = 0; i < 2; ++i) first[i] = _mm512_load_si512(table.first + 64 * i);
        gaps = _mm512_set1_epi16(static_cast<short>(2 * table.gaps));
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

    void step(const Registers &table, Job &job) {
        if (at > job.bytes.end) job.bytes.damaged();
        _mm_prefetch(reinterpret_cast<const char *>(at + job.ahead), _MM_HINT_T0);
        const __m512i low = _mm512_set1_epi16(255), one = _mm512_set1_epi16(1), two = _mm512_set1_epi16(2);
        // the 32 bytes behind `at` may be read: there are `spare` ones
        const __m512i next = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(at)));
        // bytes that are looked up are the low ones of 16 bits
        constexpr __mmask64 even = 0x5555555555555555;
        const __m512i symbol = _mm512_mask_blend_epi8(
            _mm512_movepi8_mask(state), _mm512_maskz_permutex2var_epi8(even, table.symbols[0], state, table.symbols[1]),
            _mm512_maskz_permutex2var_epi8(even, table.symbols[2], state, table.symbols[3]));
        const __m512i slots = _mm512_maskz_permutex2var_epi8(even, table.slots_of[0], symbol, table.slots_of[1]);
        const __m512i begin = _mm512_maskz_permutex2var_epi8(even, table.first[0], symbol, table.first[1]);
        const __m512i number = _mm512_sub_epi16(_mm512_and_si512(state, low), begin);
        const __m512i after = _mm512_add_epi16(_mm512_mullo_epi16(slots, _mm512_srli_epi16(state, 8)), number);
        const __mmask32 takes = _mm512_mask_cmple_epu16_mask(live, after, low);
        const __m512i longer = _mm512_or_si512(_mm512_slli_epi16(after, 8), _mm512_maskz_expand_epi16(takes, next));
        state = _mm512_mask_mov_epi16(_mm512_mask_mov_epi16(state, live, after), takes, longer);
        at += __builtin_popcount(takes);

        const __mmask32 skips = _mm512_cmpeq_epi16_mask(symbol, _mm512_set1_epi16(127));
        const __m512i sign = _mm512_and_si512(symbol, one);
        const __m512i weights = _mm512_mask_mov_epi16(_mm512_sub_epi16(_mm512_add_epi16(symbol, two), sign), skips, table.gaps);
        position = _mm512_mask_add_epi16(position, live, position, weights);
        const __mmask32 hits = _mm512_mask_cmple_epu16_mask(_kandn_mask32(skips, live), position, length);
        _mm512_store_si512(job.steps.index + job.steps.count++ * lanes_of_tile,
                           _mm512_maskz_mov_epi16(hits, _mm512_or_si512(position, sign)));
        live = _mm512_cmplt_epu16_mask(position, length);
    }
};

inline void abreast(const Registers &table, const Registers &other, Walk (&walks)[2], Job *jobs) {
    for (int64_t step = 0; step < steps_at_once && walks[0].live && walks[1].live; ++step) {
        walks[0].step(table, jobs[0]);
        walks[1].step(other, jobs[1]);
    }
}

inline void next_in_registers(Job *jobs, int count) {
    for (int i = 0; i < count; ++i) jobs[i].steps.count = 0;
    if (count == 2 && jobs[0].more && jobs[1].more) {
        Walk walks[2] = {Walk(jobs[0]), Walk(jobs[1])};
        const Registers table(*jobs[0].table);
        if (jobs[0].table == jobs[1].table) abreast(table, table, walks, jobs);
        else abreast(table, Registers(*jobs[1].table), walks, jobs);
        for (int i = 0; i < 2; ++i) walks[i].end(jobs[i]);
    }
    for (int i = 0; i < count; ++i) {
        if (!jobs[i].more || jobs[i].steps.count == steps_at_once) continue;
        Walk walk(jobs[i]);
        const Registers table(*jobs[i].table);
        while (jobs[i].steps.count < steps_at_once && walk.live) walk.step(table, jobs[i]);
        walk.end(jobs[i]);
    }
}
