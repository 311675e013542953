// Steps in registers, AVX-512 with VBMI and VBMI2: 32 states of 16 bits are one vector, the table is bytes in vectors.
//
// Included inside a namespace and between target pragmas; no include guard.

inline bool next_in_registers(Bytes &bytes, const Tile &tile, const Table &table, States &states, Steps &steps) {
    __m512i symbols[4], slots_of[2], first[2];
    for (int i = 0; i < 4; ++i) symbols[i] = _mm512_load_si512(table.symbol + 64 * i);
    for (int i = 0; i < 2; ++i) slots_of[i] = _mm512_load_si512(table.slots_of + 64 * i);
    for (int i = 0; i < 2; ++i) first[i] = _mm512_load_si512(table.first + 64 * i);
    const __m512i low = _mm512_set1_epi16(255), one = _mm512_set1_epi16(1), two = _mm512_set1_epi16(2);
    const __m512i skip = _mm512_set1_epi16(127), gaps = _mm512_set1_epi16(static_cast<short>(2 * table.gaps));
    // positions and lengths are doubled here, so that a sign finds room below
    const __m512i length = _mm512_slli_epi16(_mm512_loadu_si512(tile.length), 1);
    __m512i position = _mm512_load_si512(states.position), state = _mm512_load_si512(states.state);
    __mmask32 live = _mm512_cmplt_epu16_mask(position, length);
    const uint8_t *at = bytes.at;
    int64_t step = 0;
    for (; step < steps_at_once && live; ++step) {
        if (at > bytes.end) bytes.damaged();
        // the 32 bytes behind `at` may be read: there are `spare` ones
        const __m512i next = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(at)));
        const __m512i found = _mm512_mask_blend_epi8(_mm512_movepi8_mask(state),
                                                     _mm512_permutex2var_epi8(symbols[0], state, symbols[1]),
                                                     _mm512_permutex2var_epi8(symbols[2], state, symbols[3]));
        // indices in upper bytes are 0, and so is what these bytes multiply or are masked to
        const __m512i symbol = _mm512_and_si512(found, low);
        const __m512i slots = _mm512_and_si512(_mm512_permutex2var_epi8(slots_of[0], symbol, slots_of[1]), low);
        const __m512i begin = _mm512_and_si512(_mm512_permutex2var_epi8(first[0], symbol, first[1]), low);
        const __m512i number = _mm512_sub_epi16(_mm512_and_si512(state, low), begin);
        const __m512i after = _mm512_add_epi16(_mm512_mullo_epi16(slots, _mm512_srli_epi16(state, 8)), number);
        const __mmask32 takes = _mm512_mask_cmple_epu16_mask(live, after, low);
        const __m512i longer = _mm512_or_si512(_mm512_slli_epi16(after, 8), _mm512_maskz_expand_epi16(takes, next));
        state = _mm512_mask_mov_epi16(_mm512_mask_mov_epi16(state, live, after), takes, longer);
        at += __builtin_popcount(takes);

        const __mmask32 skips = _mm512_cmpeq_epi16_mask(symbol, skip);
        const __m512i sign = _mm512_and_si512(symbol, one);
        const __m512i weights = _mm512_mask_mov_epi16(_mm512_sub_epi16(_mm512_add_epi16(symbol, two), sign), skips, gaps);
        position = _mm512_mask_add_epi16(position, live, position, weights);
        const __mmask32 hits = _mm512_mask_cmple_epu16_mask(_kandn_mask32(skips, live), position, length);
        _mm512_store_si512(steps.index + step * lanes_of_tile, _mm512_maskz_mov_epi16(hits, _mm512_or_si512(position, sign)));
        live = _mm512_cmplt_epu16_mask(position, length);
    }
    steps.count = step;
    bytes.at = at;
    _mm512_store_si512(states.state, state);
    _mm512_store_si512(states.position, position);
    return live != 0;
}
