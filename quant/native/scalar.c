/* Plain C that reads like the formula: the fallback, and what the other files are compared with. */
#include "kern.h"
#include "quantize.h"
#include "search.h"
#include "solve.h"

static int code(const kern_weight *w, int64_t tile, int64_t k, int c) {
    if (w->bits == 8) return w->codes[(tile * w->k / 4 + k / 4) * LINE + 4 * c + k % 4];
    uint8_t byte = w->codes[(tile * w->k / 8 + k / 8) * LINE + 4 * c + k % 4];
    return k % 8 < 4 ? byte & 15 : byte >> 4;
}

static int zero(const kern_weight *w, int64_t place) { return w->zeros[w->one_zero ? 0 : place]; }

/* Where the scale of output c of a tile stands for the group of input k. */
static int64_t place(const kern_weight *w, int64_t tile, int64_t k, int c) {
    return (tile * (w->k / w->group) + k / w->group) * TILE + c;
}

/* The integer of input k in row r of a block. */
static int32_t activation(int precision, const uint32_t *words, int rows, int r, int64_t k) {
    if (precision == FAST) return ((const int8_t *)(words + k / 4 * rows + r))[k % 4];
    int64_t place = k / 8 * 8 + k % 2 * 4 + k % 8 / 2;
    return ((const int16_t *)(words + place / 2 * rows + r))[place % 2];
}

static float integer_output(int precision, int rows, const kern_weight *w, int64_t tile,
                            const kern_input *x, int64_t row, int r, int c) {
    const uint32_t *words = x->words + row * w->k / (precision == FAST ? 4 : 2);
    const float *scales = x->scales + row * (w->k / x->block) + r;
    const float *sums = x->sums + row * (w->k / w->group) + r;
    float total = 0;
    for (int64_t start = 0; start < w->k; start += w->group, sums += rows) {
        float part = 0;
        for (int64_t k = start; k < start + w->group; scales += rows) {
            int32_t dot = 0;
            for (int64_t end = k + x->block; k < end; k++)
                dot += code(w, tile, k, c) * activation(precision, words, rows, r, k);
            part = fmaf((float)dot, *scales, part);
        }
        int64_t p = place(w, tile, start, c);
        part = fmaf(-(float)zero(w, p), *sums, part);
        total = fmaf(part, from_float16(w->scales[p]), total);
    }
    return total;
}

static float exact_output(int rows, const kern_weight *w, int64_t tile, const kern_input *x,
                          int64_t row, int r, int c) {
    const float *values = (const float *)x->words + row * w->k + r;
    float total = 0;
    for (int64_t start = 0; start < w->k; start += w->group) {
        float part = 0;
        int z = zero(w, place(w, tile, start, c));
        for (int64_t k = start; k < start + w->group; k++)
            part += (float)(code(w, tile, k, c) - z) * values[k * rows];
        total += part * from_float16(w->scales[place(w, tile, start, c)]);
    }
    return total;
}

static void tile_rows(int precision, int rows, const kern_weight *w, int64_t tile,
                      const kern_input *x, int64_t row, float *out) {
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < TILE; c++)
            out[r * TILE + c] = precision == EXACT
                                    ? exact_output(rows, w, tile, x, row, r, c)
                                    : integer_output(precision, rows, w, tile, x, row, r, c);
}

/* Here float32 inputs stay as they are. */
static void prepare(int precision, const kern_weight *w, const kern_rows *x, int64_t row,
                    int64_t block, int rows, uint32_t *words, float *scales, float *sums) {
    if (precision == EXACT) precision = PLAIN;
    prepare_row(precision, w, x, row, block, rows, words, scales, sums);
}

/* Without panels: any number of rows goes by tile. */
const kern_isa kern_scalar = {
    .name = "scalar",
    .tile_rows = {4, 4, 4},
    .prepare = prepare,
    .put = put_outputs,
    .tile = tile_rows,
    .round_rows = round_rows,
    .search_row = search_row,
};
