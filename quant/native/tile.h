/* The kernels, written once over the vector operations that the including file defines.
 *
 * LANES 32-bit lanes a vector, one lane an output; types vi, vf, v8 (accumulator of dot8).
 *   load(p) set1_i(int) set1_f(float) zero_i() zero_f() zero_8()
 *   low(raw) high(raw)      nibbles as bytes: inputs 0..3 and 4..7 of each lane
 *   pairs(raw, s)           16-bit codes, s = 0..3: inputs (0,2) (4,6) (1,3) (5,7)
 *   byte_pairs(raw, s)      of 8-bit codes, s = 0, 1: inputs (0,2) (1,3)
 *   nibble(raw, i)          float of the i-th nibble: inputs 0 4 1 5 2 6 3 7
 *   byte(raw, i)            float of the i-th byte
 *   dot8(acc, w, a)         acc + the 4 products of bytes; total8(acc) as 32-bit lanes
 *   dot16(acc, w, a)        acc + the 2 products of 16-bit values
 *   words(p)                4 bytes at p in every lane
 *   sub_i mul_i to_f fma_f mul_f sub_f load_f store_f load_half(p) load_bytes(p)
 *
 * `rows` is a constant in every call, so that accumulators are registers. */
#define VECTORS (TILE / LANES)
#define INLINE static inline __attribute__((always_inline))
#define EACH(i, n) for (int i = 0; i < (n); i++)

/* Four bytes of a tile's line are one output: vector v starts here. */
#define PART(line, v) ((line) + (v) * LANES * 4)

typedef struct {
    vi integer[VECTORS];
    vf scale[VECTORS];
} group_grid;

INLINE group_grid load_grid(const kern_weight *w, int64_t tile, int64_t g) {
    group_grid grid;
    int64_t place = (tile * (w->k / w->group) + g) * TILE;
    EACH(v, VECTORS) {
        grid.scale[v] = load_half(w->scales + place + v * LANES);
        grid.integer[v] = w->one_zero ? set1_i(*w->zeros) : load_bytes(w->zeros + place + v * LANES);
    }
    return grid;
}

/* One block of 32 inputs in int8: exact dot products of codes and activations. */
INLINE void dots_fast(int rows, const uint8_t *line, const int8_t *x, int64_t ld,
                      vi dots[][VECTORS]) {
    v8 sums[TILE_ROWS_FAST][VECTORS];
    EACH(r, rows) EACH(v, VECTORS) sums[r][v] = zero_8();
    EACH(l, 4) {
        vi lows[VECTORS], highs[VECTORS];
        EACH(v, VECTORS) {
            vi raw = load(PART(line + l * LINE, v));
            lows[v] = low(raw);
            highs[v] = high(raw);
        }
        EACH(r, rows) {
            vi first = words(x + r * ld + 8 * l), second = words(x + r * ld + 8 * l + 4);
            EACH(v, VECTORS) {
                sums[r][v] = dot8(sums[r][v], lows[v], first);
                sums[r][v] = dot8(sums[r][v], highs[v], second);
                PIN(sums[r][v]);
            }
        }
    }
    EACH(r, rows) EACH(v, VECTORS) dots[r][v] = total8(sums[r][v]);
}

/* One block of int16 activations. */
INLINE void dots_high(int rows, int bits, const uint8_t *line, int64_t block, const int16_t *x,
                      int64_t ld, vi dots[][VECTORS]) {
    EACH(r, rows) EACH(v, VECTORS) dots[r][v] = zero_i();
    for (int64_t k = 0; k < block; k += 8, line += LINE * bits / 4) EACH(s, 4) {
            /* with 8 bits, inputs 0..3 and 4..7 stand in two lines */
            const uint8_t *place = bits == 8 ? line + s % 2 * LINE : line;
            vi codes[VECTORS];
            EACH(v, VECTORS) {
                vi raw = load(PART(place, v));
                codes[v] = bits == 8 ? byte_pairs(raw, s / 2) : pairs(raw, s);
            }
            EACH(r, rows) {
                vi pair = words(x + r * ld + k + 2 * s);
                EACH(v, VECTORS) {
                    dots[r][v] = dot16(dots[r][v], codes[v], pair);
                    PIN(dots[r][v]);
                }
            }
        }
}

/* out (rows, 16) in an integer precision: per block exact integers, then float32 sums. */
INLINE void integer_tile(int precision, int rows, int bits, const kern_weight *w, int64_t tile,
                         const kern_input *x, int64_t row, float *out) {
    const int64_t blocks = w->k / x->block, per_group = w->group / x->block;
    const int64_t block_bytes = x->block * TILE * bits / 8;
    const uint8_t *codes = w->codes + tile * w->k * TILE * bits / 8;
    vf totals[TILE_ROWS_FAST][VECTORS];
    EACH(r, rows) EACH(v, VECTORS) totals[r][v] = zero_f();
    for (int64_t g = 0; g < w->k / w->group; g++) {
        group_grid grid = load_grid(w, tile, g);
        vf parts[TILE_ROWS_FAST][VECTORS];
        EACH(r, rows) EACH(v, VECTORS) parts[r][v] = zero_f();
        for (int64_t b = g * per_group; b < (g + 1) * per_group; b++, codes += block_bytes) {
            vi dots[TILE_ROWS_FAST][VECTORS];
            const int64_t place = row * x->ld + b * x->block;
            prefetch(codes + 1024);
            if (precision == FAST)
                dots_fast(rows, codes, (const int8_t *)x->rows + place, x->ld, dots);
            else
                dots_high(rows, bits, codes, x->block, (const int16_t *)x->rows + place, x->ld,
                          dots);
            EACH(r, rows) {
                const int64_t at = (row + r) * blocks + b;
                vi sum = set1_i(x->sums[at]);
                vf scale = set1_f(x->scales[at]);
                EACH(v, VECTORS) {
                    vi centred = sub_i(dots[r][v], mul_i(grid.integer[v], sum));
                    parts[r][v] = fma_f(to_f(centred), scale, parts[r][v]);
                }
            }
        }
        EACH(r, rows) EACH(v, VECTORS)
        totals[r][v] = fma_f(parts[r][v], grid.scale[v], totals[r][v]);
    }
    EACH(r, rows) EACH(v, VECTORS) store_f(out + r * TILE + v * LANES, totals[r][v]);
}

/* The i-th input of a line as floats, code - zero. */
INLINE vf centred(int bits, vi raw, int i, vf zero) {
    return sub_f(bits == 8 ? byte(raw, i) : nibble(raw, i), zero);
}

/* out (rows, 16) in float32; several partial sums, since one chain of additions is slow. */
INLINE void exact_tile(int rows, int bits, const kern_weight *w, int64_t tile, const kern_input *x,
                       int64_t row, float *out) {
    enum { NIBBLE_ORDER = 0x73625140 }; /* the inputs of nibbles 0..7, four bits each */
    const int per_line = 32 / bits;
    const uint8_t *line = w->codes + tile * w->k * TILE * bits / 8;
    const float *values = (const float *)x->rows + row * x->ld;
    const int chains = rows * VECTORS >= 8 ? 1 : rows * VECTORS >= 4 ? 2 : 4;
    vf totals[TILE_ROWS_EXACT][VECTORS];
    EACH(r, rows) EACH(v, VECTORS) totals[r][v] = zero_f();
    for (int64_t g = 0; g < w->k / w->group; g++) {
        group_grid grid = load_grid(w, tile, g);
        vf parts[TILE_ROWS_EXACT][VECTORS][4];
        EACH(r, rows) EACH(v, VECTORS) EACH(c, chains) parts[r][v][c] = zero_f();
        for (int64_t k = 0; k < w->group; k += per_line, line += LINE, values += per_line) {
            vi raw[VECTORS];
            prefetch(line + 1024);
            EACH(v, VECTORS) raw[v] = load(PART(line, v));
            EACH(i, per_line) {
                const int input = bits == 8 ? i : NIBBLE_ORDER >> 4 * i & 7;
                EACH(v, VECTORS) {
                    vf weight = centred(bits, raw[v], i, to_f(grid.integer[v]));
                    EACH(r, rows) {
                        vf value = set1_f(values[r * x->ld + input]);
                        parts[r][v][i % chains] = fma_f(weight, value, parts[r][v][i % chains]);
                    }
                }
            }
        }
        EACH(r, rows) EACH(v, VECTORS) {
            for (int c = 1; c < chains; c++)
                parts[r][v][0] = add_f(parts[r][v][0], parts[r][v][c]);
            totals[r][v] = fma_f(parts[r][v][0], grid.scale[v], totals[r][v]);
        }
    }
    EACH(r, rows) EACH(v, VECTORS) store_f(out + r * TILE + v * LANES, totals[r][v]);
}

#define CASE(n, call) \
    case n:           \
        call(n);      \
        break;
#define CASES4(call) CASE(1, call) CASE(2, call) CASE(3, call) CASE(4, call)
#define CASES8(call) CASES4(call) CASE(5, call) CASE(6, call) CASE(7, call) CASE(8, call)

static void tile_fast(int rows, const kern_weight *w, int64_t tile, const kern_input *x,
                      int64_t row, float *out) {
#define CALL(n) integer_tile(FAST, n, 4, w, tile, x, row, out)
    switch (rows) { CASES_FAST(CALL) }
#undef CALL
}

static void tile_high(int rows, const kern_weight *w, int64_t tile, const kern_input *x,
                      int64_t row, float *out) {
#define CALL(n) integer_tile(HIGH, n, 4, w, tile, x, row, out)
    switch (rows) { CASES_FAST(CALL) }
#undef CALL
}

static void tile_high_8bit(int rows, const kern_weight *w, int64_t tile, const kern_input *x,
                           int64_t row, float *out) {
    for (int r = 0; r < rows; r++) integer_tile(HIGH, 1, 8, w, tile, x, row + r, out + r * TILE);
}

static void tile_exact(int rows, const kern_weight *w, int64_t tile, const kern_input *x,
                       int64_t row, float *out) {
#define CALL(n) exact_tile(n, 4, w, tile, x, row, out)
    switch (rows) { CASES4(CALL) }
#undef CALL
}

static void tile_exact_8bit(int rows, const kern_weight *w, int64_t tile, const kern_input *x,
                            int64_t row, float *out) {
    for (int r = 0; r < rows; r++) exact_tile(1, 8, w, tile, x, row + r, out + r * TILE);
}

static void tile_rows(int precision, int rows, const kern_weight *w, int64_t tile,
                      const kern_input *x, int64_t row, float *out) {
    if (precision == EXACT)
        (w->bits == 8 ? tile_exact_8bit : tile_exact)(rows, w, tile, x, row, out);
    else if (precision == HIGH)
        (w->bits == 8 ? tile_high_8bit : tile_high)(rows, w, tile, x, row, out);
    else
        tile_fast(rows, w, tile, x, row, out);
}

INLINE void panel_of(int bits, const kern_weight *w, int64_t tile, int64_t start, int64_t end,
                     float *out) {
    const int per_line = 32 / bits;
    const uint8_t *line = w->codes + (tile * w->k + start) * TILE * bits / 8;
    for (int64_t k = start; k < end; out += per_line * TILE, k += per_line, line += LINE) {
        group_grid grid = load_grid(w, tile, k / w->group);
        EACH(v, VECTORS) {
            vi raw = load(PART(line, v));
            vf zero = to_f(grid.integer[v]);
            EACH(i, per_line) {
                const int input = bits == 8 ? i : 0x73625140 >> 4 * i & 7;
                vf weight = mul_f(centred(bits, raw, i, zero), grid.scale[v]);
                store_f(out + input * TILE + v * LANES, weight);
            }
        }
    }
}

static void panel(const kern_weight *w, int64_t tile, int64_t start, int64_t end, float *out) {
    if (w->bits == 8)
        panel_of(8, w, tile, start, end, out);
    else
        panel_of(4, w, tile, start, end, out);
}

INLINE void multiply_rows(int rows, const float *x, int64_t ld, const float *panel, int64_t count,
                          float *out) {
    vf sums[PANEL_ROWS][VECTORS];
    EACH(r, rows) EACH(v, VECTORS) sums[r][v] = load_f(out + r * TILE + v * LANES);
    for (int64_t k = 0; k < count; k++, panel += TILE) {
        vf weights[VECTORS];
        EACH(v, VECTORS) weights[v] = load_f(panel + v * LANES);
        EACH(r, rows) {
            vf value = set1_f(x[r * ld + k]);
            EACH(v, VECTORS) sums[r][v] = fma_f(weights[v], value, sums[r][v]);
        }
    }
    EACH(r, rows) EACH(v, VECTORS) store_f(out + r * TILE + v * LANES, sums[r][v]);
}

static void multiply(int rows, const float *x, int64_t ld, const float *panel, int64_t count,
                     float *out) {
#define CALL(n) multiply_rows(n, x, ld, panel, count, out)
    switch (rows) { CASES_PANEL(CALL) }
#undef CALL
}

#define KERNELS(name)                                                                   \
    {                                                                                   \
        name, {4, TILE_ROWS_FAST, TILE_ROWS_FAST}, PANEL_ROWS, quantize_row, tile_rows, \
            panel, multiply                                                             \
    }
