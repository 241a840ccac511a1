/* The kernels, written once over the vector operations that the including file defines.
 *
 * LANES 32-bit lanes a vector, one lane an output; types vi, vf, v8 (accumulator of dot8).
 *   load(p) set1_i(int) set1_f(float) zero_i() zero_f() zero_8()
 *   low(raw) high(raw)      nibbles as bytes: inputs 0..3 and 4..7 of each lane
 *   pairs(raw, s)           16-bit codes, s = 0..3: inputs (0,2) (4,6) (1,3) (5,7)
 *   byte_pairs(raw, s)      of 8-bit codes, s = 0, 1: inputs (0,2) (1,3)
 *   field(raw, down, mask)  the bits of `mask` of each lane shifted down
 *   up(a, n)                each lane shifted up
 *   repeat(zero, ones)      the float as an integer times `ones`
 *   dot8(acc, w, a)         acc + the 4 products of bytes; total8(acc) as 32-bit lanes
 *   dot16(acc, w, a)        acc + the 2 products of 16-bit values
 *   word(p)                 4 bytes at p in every lane; value(p) as a float
 *   store(p, a)             the vector to any address
 *   add_i sub_i to_f fma_f add_f mul_f sub_f load_f store_f load_half(p) load_bytes(p)
 * Where LOOKUP is defined, and instead of up:
 *   down(a, n)              each lane shifted down; sub_bytes(a, b)
 *   all_codes()             the floats 0..15
 *   choose_of_16(a, values) the value that the lowest 4 bits of each lane name
 *   choose_of_32(a)         the integer that the lowest 5 bits are in two's complement, as a float
 *
 * `rows` is a constant in every call, so that accumulators are registers. */
#define AHEAD 8192 /* bytes of weights to prefetch: more than two threads of a fast memory have in flight */
#define VECTORS (TILE / LANES)
/* In which order partial sums are added. AVX-VNNI has its own, by which a test tells it from AVX2. */
#ifndef LAST_FIRST
#define LAST_FIRST 0
#endif
#define INLINE static inline __attribute__((always_inline))
/* Unrolled early, so that arrays of vectors become registers. */
#define EACH(i, n) _Pragma("GCC unroll 16") for (int i = 0; i < (n); i++)

/* Four bytes of a tile's line are one output: vector v starts here. */
#define PART(line, v) ((line) + (v) * LANES * 4)

typedef struct {
    vf zero[VECTORS], scale[VECTORS];
} group_grid;

INLINE group_grid load_grid(const kern_weight *w, int64_t tile, int64_t g) {
    group_grid grid;
    int64_t place = (tile * (w->k / w->group) + g) * TILE;
    EACH(v, VECTORS) {
        grid.scale[v] = load_half(w->scales + place + v * LANES);
        grid.zero[v] =
            w->one_zero ? set1_f(*w->zeros) : to_f(load_bytes(w->zeros + place + v * LANES));
    }
    return grid;
}

/* One block of 32 inputs in int8: exact dot products of codes and activations. */
INLINE void dots_fast(int rows, const uint8_t *line, const uint32_t *x, vi dots[][VECTORS]) {
    v8 sums[TILE_ROWS_FAST][VECTORS];
    EACH(r, rows) EACH(v, VECTORS) sums[r][v] = zero_8();
    EACH(l, 4) {
        prefetch(line + l * LINE + AHEAD);
        vi lows[VECTORS], highs[VECTORS];
        EACH(v, VECTORS) {
            vi raw = load(PART(line + l * LINE, v));
            lows[v] = low(raw);
            highs[v] = high(raw);
        }
        EACH(r, rows) {
            vi first = word(x + 2 * l * rows + r), second = word(x + (2 * l + 1) * rows + r);
            EACH(v, VECTORS) {
                sums[r][v] = dot8(sums[r][v], lows[v], first);
                sums[r][v] = dot8(sums[r][v], highs[v], second);
                PIN(sums[r][v]);
            }
        }
    }
    EACH(r, rows) EACH(v, VECTORS) dots[r][v] = total8(sums[r][v]);
}

/* One block of int16 activations; few outputs at a time need several sums to keep busy: as many as
 * there are registers for. */
INLINE void dots_high(int rows, int bits, const uint8_t *line, int64_t block, const uint32_t *x,
                      vi dots[][VECTORS]) {
    const int outputs = rows * VECTORS;
    const int chains = outputs * 4 <= MOST_SUMS ? 4 : outputs * 2 <= MOST_SUMS ? 2 : 1;
    vi sums[TILE_ROWS_FAST][VECTORS][4];
    EACH(r, rows) EACH(v, VECTORS) EACH(c, chains) sums[r][v][c] = zero_i();
    for (int64_t k = 0; k < block; k += 8, line += LINE * bits / 4, x += 4 * rows) {
        EACH(b, bits / 4) prefetch(line + b * LINE + AHEAD);
        EACH(s, 4) {
            /* with 8 bits, inputs 0..3 and 4..7 stand in two lines */
            const uint8_t *place = bits == 8 ? line + s % 2 * LINE : line;
            vi codes[VECTORS];
            EACH(v, VECTORS) {
                vi raw = load(PART(place, v));
                codes[v] = bits == 8 ? byte_pairs(raw, s / 2) : pairs(raw, s);
            }
            EACH(r, rows) {
                vi pair = word(x + s * rows + r);
                EACH(v, VECTORS) {
                    sums[r][v][s % chains] = dot16(sums[r][v][s % chains], codes[v], pair);
                    PIN(sums[r][v][s % chains]);
                }
            }
        }
    }
    EACH(r, rows) EACH(v, VECTORS) {
        dots[r][v] = sums[r][v][0];
        for (int c = 1; c < chains; c++) dots[r][v] = add_i(dots[r][v], sums[r][v][c]);
    }
}

/* out (rows, 16) in an integer precision: per block exact integers, then float32 sums. */
INLINE void integer_tile(int precision, int rows, int bits, const kern_weight *w, int64_t tile,
                         const kern_input *x, int64_t row, float *out) {
    const int64_t per_group = w->group / x->block,
                  block_words = x->block / (precision == FAST ? 4 : 2);
    const int64_t block_bytes = x->block * TILE * bits / 8;
    const uint8_t *codes = w->codes + tile * w->k * TILE * bits / 8;
    const uint32_t *words = x->words + row * (w->k / x->block) * block_words;
    const float *scales = x->scales + row * (w->k / x->block);
    const float *sums = x->sums + row * (w->k / w->group);
    vf totals[TILE_ROWS_FAST][VECTORS];
    EACH(r, rows) EACH(v, VECTORS) totals[r][v] = zero_f();
    for (int64_t g = 0; g < w->k / w->group; g++, sums += rows) {
        vf parts[TILE_ROWS_FAST][VECTORS];
        EACH(r, rows) EACH(v, VECTORS) parts[r][v] = zero_f();
        for (int64_t b = 0; b < per_group; b++) {
            vi dots[TILE_ROWS_FAST][VECTORS];
            if (precision == FAST)
                dots_fast(rows, codes, words, dots);
            else
                dots_high(rows, bits, codes, x->block, words, dots);
            EACH(r, rows)
            EACH(v, VECTORS) parts[r][v] = fma_f(to_f(dots[r][v]), value(scales + r), parts[r][v]);
            codes += block_bytes;
            words += block_words * rows;
            scales += rows;
        }
        group_grid grid = load_grid(w, tile, g);
        EACH(r, rows) EACH(v, VECTORS) {
            vf zeros = sub_f(zero_f(), grid.zero[v]);
            totals[r][v] =
                fma_f(fma_f(zeros, value(sums + r), parts[r][v]), grid.scale[v], totals[r][v]);
        }
    }
    EACH(r, rows) EACH(v, VECTORS) store_f(out + r * TILE + v * LANES, totals[r][v]);
}

#ifndef LOOKUP
/* Four inputs of each output as floats, from the 32-bit integers
 *     L = v0 + 256 v1 + 256^2 v2 + 256^3 v3,   v = code - zero,
 * which one mask and one subtraction give for all four. L shifted up by 24, 16, 8 and 0 bits is
 *     2^24 (v0),  2^24 (v1 + v0/256),  2^24 (v2 + v1/256 + v0/256^2),  ...
 * and the inputs that `mix_inputs` prepared undo the mixture: x3, x2 - x3/256, x1 - x2/256, x0 -
 * x1/256. So a code costs no mask and no subtraction of its own. The rounding of a mixed term is
 * float32's: relative to itself, or to 1/256 of its neighbour. */
#define UNIT 0x1p-24f
#define PREPARE prepare_row
typedef struct {
    vi bytes[VECTORS]; /* each zero four times */
} exact_zeros;

INLINE exact_zeros zeros_of(const group_grid *grid) {
    exact_zeros zeros;
    EACH(v, VECTORS) zeros.bytes[v] = repeat(grid->zero[v], 0x01010101);
    return zeros;
}

INLINE vf exact_code(vi raw, int i, const exact_zeros *zeros, int v, int one_zero) {
    (void)one_zero;
    vi four = sub_i(field(raw, i & 4, 0x0f0f0f0f), zeros->bytes[v]);
    return to_f(i % 4 == 3 ? four : up(four, 24 - 8 * (i % 4)));
}
#else
/* A code less its zero is -16..15, whose float the lowest 5 bits of a lane choose from two
 * registers. Where all outputs have one zero one register holds the 16 `values` of a code. */
#define UNIT 1.0f
#define PREPARE prepare_plain

typedef struct {
    vi bytes[VECTORS]; /* each zero four times */
    vf values;
} exact_zeros;

INLINE exact_zeros zeros_of(const group_grid *grid) {
    exact_zeros zeros = {.values = sub_f(all_codes(), grid->zero[0])};
    EACH(v, VECTORS) zeros.bytes[v] = repeat(grid->zero[v], 0x01010101);
    return zeros;
}

INLINE vf exact_code(vi raw, int i, const exact_zeros *zeros, int v, int one_zero) {
    if (one_zero) return choose_of_16(down(raw, 8 * (i & 3) + (i & 4)), zeros->values);
    vi four = sub_bytes(field(raw, i & 4, 0x0f0f0f0f), zeros->bytes[v]);
    return choose_of_32(down(four, 8 * (i & 3)));
}

/* Here float32 inputs stay as they are. */
static void prepare_plain(int precision, const kern_weight *w, const kern_rows *x, int64_t row,
                          int64_t block, int rows, uint32_t *words, float *scales, float *sums) {
    if (precision == EXACT) precision = PLAIN;
    prepare_row(precision, w, x, row, block, rows, words, scales, sums);
}
#endif

/* The products of one line, 8 inputs, added to `parts`, whose sums are 1 / UNIT too large. */
INLINE void exact_line(int rows, int chains, int one_zero, const uint8_t *line,
                       const exact_zeros *zeros, const float *values, vf parts[][VECTORS][8]) {
    vi raw[VECTORS];
    EACH(v, VECTORS) {
        raw[v] = load(PART(line, v));
        PIN(raw[v]); /* or gcc loads it again for every shift */
    }
    EACH(half, 2) EACH(v, VECTORS) {
        EACH(j, 4) {
            const int i = 4 * half + j;
            vf code = exact_code(raw[v], i, zeros, v, one_zero);
            EACH(r, rows) {
                vf *part = &parts[r][v][i % chains];
                *part = fma_f(code, value(values + i * rows + r), *part);
                PIN(*part);
            }
        }
    }
}

/* The same for 8 bits, 4 inputs: codes are too long to be mixed. */
INLINE void exact_line_8bit(const uint8_t *line, const group_grid *grid, const float *values,
                            vf parts[][VECTORS][8]) {
    EACH(v, VECTORS) EACH(j, 4) {
        vf code = sub_f(to_f(field(load(PART(line, v)), 8 * j, 255)), grid->zero[v]);
        parts[0][v][j] = fma_f(code, value(values + j), parts[0][v][j]);
    }
}

/* out (rows, 16) in float32; several partial sums, since one chain of additions is slow. */
INLINE void exact_tile(int rows, int bits, int one_zero, const kern_weight *w, int64_t tile,
                       const kern_input *x, int64_t row, float *out) {
    const int per_line = 32 / bits, lines = rows == 1 ? 4 : 1; /* at a time */
    const uint8_t *line = w->codes + tile * w->k * TILE * bits / 8;
    const float *values = (const float *)x->words + row * w->k;
    const int outputs = rows * VECTORS;
    const int chains = bits == 8 ? 4 : outputs >= 8 ? 1 : outputs >= 4 ? 2 : outputs >= 2 ? 4 : 8;
    vf totals[TILE_ROWS_EXACT][VECTORS];
    EACH(r, rows) EACH(v, VECTORS) totals[r][v] = zero_f();
    for (int64_t g = 0; g < w->k / w->group; g++) {
        group_grid grid = load_grid(w, tile, g);
        exact_zeros zeros = zeros_of(&grid);
        vf parts[TILE_ROWS_EXACT][VECTORS][8];
        EACH(r, rows) EACH(v, VECTORS) EACH(c, 8) parts[r][v][c] = zero_f();
        for (int64_t k = 0; k < w->group; k += lines * per_line)
            EACH(l, lines) {
                prefetch(line + AHEAD);
                if (bits == 8)
                    exact_line_8bit(line, &grid, values, parts);
                else
                    exact_line(rows, chains, one_zero, line, &zeros, values, parts);
                line += LINE;
                values += per_line * rows;
            }
        EACH(r, rows) EACH(v, VECTORS) {
            EACH(i, chains - 1) {
                const int c = LAST_FIRST ? chains - 1 - i : 1 + i;
                parts[r][v][0] = add_f(parts[r][v][0], parts[r][v][c]);
            }
            vf scale = mul_f(grid.scale[v], set1_f(bits == 8 ? 1.0f : UNIT));
            totals[r][v] = fma_f(parts[r][v][0], scale, totals[r][v]);
        }
    }
    EACH(r, rows) EACH(v, VECTORS) store_f(out + r * TILE + v * LANES, totals[r][v]);
}

#define CASE(n, call)                                                                              \
    case n:                                                                                        \
        call(n);                                                                                   \
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

/* With 8 bits a block of rows is a single one. */
static void tile_8bit(int precision, const kern_weight *w, int64_t tile, const kern_input *x,
                      int64_t row, float *out) {
    if (precision == EXACT)
        exact_tile(1, 8, 0, w, tile, x, row, out);
    else
        integer_tile(HIGH, 1, 8, w, tile, x, row, out);
}

static void tile_exact(int rows, const kern_weight *w, int64_t tile, const kern_input *x,
                       int64_t row, float *out) {
#define CALL(n) exact_tile(n, 4, 0, w, tile, x, row, out)
    switch (rows) { CASES_EXACT(CALL) }
#undef CALL
}

#ifdef LOOKUP
static void tile_exact_one_zero(int rows, const kern_weight *w, int64_t tile, const kern_input *x,
                                int64_t row, float *out) {
#define CALL(n) exact_tile(n, 4, 1, w, tile, x, row, out)
    switch (rows) { CASES_EXACT(CALL) }
#undef CALL
}
#else
#define tile_exact_one_zero tile_exact
#endif

static void tile_rows(int precision, int rows, const kern_weight *w, int64_t tile,
                      const kern_input *x, int64_t row, float *out) {
    if (w->bits == 8)
        tile_8bit(precision, w, tile, x, row, out);
    else if (precision == EXACT && w->one_zero)
        tile_exact_one_zero(rows, w, tile, x, row, out);
    else if (precision == EXACT)
        tile_exact(rows, w, tile, x, row, out);
    else if (precision == HIGH)
        tile_high(rows, w, tile, x, row, out);
    else
        tile_fast(rows, w, tile, x, row, out);
}

#include "panel.h"

#define KERNELS(name_)                                                                             \
    {                                                                                              \
        .name = name_,                                                                             \
        .tile_rows = {TILE_ROWS_EXACT, TILE_ROWS_FAST, TILE_ROWS_FAST},                            \
        .panel_rows = {PANEL_ROWS, PANEL_ROWS_CODES, PANEL_ROWS_CODES},                            \
        .panel_tiles = PANEL_TILES,                                                                \
        .prepare = PREPARE,                                                                        \
        .put = put_outputs,                                                                        \
        .tile = tile_rows,                                                                         \
        .unpack = unpack,                                                                          \
        .multiply = multiply,                                                                      \
        .round_rows = round_rows,                                                                  \
        .search_row = search_row,                                                                  \
    }
