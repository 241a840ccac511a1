/* One row of activations into words, and outputs into their dtype; compiled for each instruction set,
 * whose flags vectorize it.
 *
 * A block's scale is its largest magnitude / 127 or / 32767. Magnitudes are compared as integers:
 * the order is that of the floats, and a NaN stands above infinity, so one comparison finds both.
 * A block that holds one gets the scale NaN, which reaches every output of its row and no other.
 * Blocks below 2^-100 count as zero. Nothing is fused but by fmaf, so that every instruction set
 * rounds alike. */
#include "floats.h"

#include <math.h>
#include <string.h>

#define MOST_BLOCK 256

/* Lengths are constants where this is inlined with one: then loops need no remainder. */
#define INLINED static inline __attribute__((always_inline))

/* Integers of one block, and their sum; returns its scale. */
INLINED float quantize_block(const float *x, int64_t block, float top, int32_t *q, int32_t *total) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it leaves the nearest integer */
    int32_t most = 0;
    for (int64_t i = 0; i < block; i++) {
        int32_t bits;
        memcpy(&bits, x + i, 4);
        bits &= 0x7fffffff;
        most = most > bits ? most : bits;
    }
    float largest;
    memcpy(&largest, &most, 4);
    int finite = most < 0x7f800000, empty = largest < 0x1p-100f;
    float inverse = finite && !empty ? top / largest : 0.0f;
    int32_t mask = finite ? -1 : 0, sum = 0;
    for (int64_t i = 0; i < block; i++) {
        float rounded = (x[i] * inverse + magic) - magic;
        q[i] = (int32_t)rounded & mask;
        sum += q[i];
    }
    *total = sum;
    return !finite ? NAN : empty ? 0.0f : largest / top;
}

INLINED void put_words(const void *from, int64_t count, int rows, uint32_t *words) {
    if (rows == 1) {
        memcpy(words, from, count * 4);
        return;
    }
    for (int64_t i = 0; i < count; i++) memcpy(words + i * rows, (const char *)from + 4 * i, 4);
}

INLINED void put_int8(const int32_t *q, int64_t block, int rows, uint32_t *words) {
    int8_t bytes[MOST_BLOCK];
    for (int64_t i = 0; i < block; i++) bytes[i] = (int8_t)q[i];
    put_words(bytes, block / 4, rows, words);
}

INLINED void put_int16(const int32_t *q, int64_t block, int rows, uint32_t *words) {
    int16_t values[MOST_BLOCK];
    for (int64_t i = 0; i < block; i += 8)
        for (int j = 0; j < 4; j++) {
            values[i + j] = (int16_t)q[i + 2 * j];
            values[i + 4 + j] = (int16_t)q[i + 2 * j + 1];
        }
    put_words(values, block / 2, rows, words);
}

static float element(const kern_rows *x, int64_t at) {
    if (x->dtype == FLOAT32) return ((const float *)x->rows)[at];
    const uint16_t half = ((const uint16_t *)x->rows)[at];
    return x->dtype == FLOAT16 ? from_float16(half) : from_bfloat16(half);
}

/* The inputs start..start+count-1 of a row as floats, which `picked` has room for; 0 for padding. */
static const float *pick(const kern_rows *x, int64_t row, int64_t start, int64_t count,
                         float *picked) {
    const int64_t at = row * x->apart;
    if (x->gather)
        for (int64_t i = start; i < start + count; i++)
            picked[i - start] = x->gather[i] < 0 ? 0.0f : element(x, at + x->gather[i]);
    else if (x->dtype == FLOAT32)
        return (const float *)x->rows + at + start;
    const uint16_t *halves = (const uint16_t *)x->rows + at + start;
    if (!x->gather && x->dtype == FLOAT16)
        for (int64_t i = 0; i < count; i++) picked[i] = from_float16(halves[i]);
    if (!x->gather && x->dtype == BFLOAT16)
        for (int64_t i = 0; i < count; i++) picked[i] = from_bfloat16(halves[i]);
    return picked;
}

/* Inputs that undo the mixture in which the exact tiles of tile.h unpack four codes. */
static const float *mix_inputs(const float *x, int64_t count, float *mixed) {
    for (int64_t i = 0; i < count; i += 4) {
        for (int j = 0; j < 3; j++) mixed[i + j] = x[i + j] - x[i + j + 1] * 0x1p-8f;
        mixed[i + 3] = x[i + 3];
    }
    return mixed;
}

INLINED void prepare_blocks(int precision, const kern_weight *w, const kern_rows *x, int64_t row,
                            int64_t block, int rows, uint32_t *words, float *scales,
                            float *sums) {
    float picked[MOST_BLOCK], mixed[MOST_BLOCK];
    int32_t q[MOST_BLOCK];
    for (int64_t k = 0; k < w->k; k += block) {
        const float *values = pick(x, row, k, block, picked);
        if (precision == PLAIN || precision == EXACT) {
            if (precision == EXACT && w->bits == 4) values = mix_inputs(values, block, mixed);
            put_words(values, block, rows, words + k * rows);
            continue;
        }
        int32_t total;
        float top = precision == FAST ? 127.0f : 32767.0f;
        float scale = quantize_block(values, block, top, q, &total);
        if (precision == FAST)
            put_int8(q, block, rows, words + k / 4 * rows);
        else
            put_int16(q, block, rows, words + k / 2 * rows);
        float *sum = sums + k / w->group * rows;
        *sum = fmaf((float)total, scale, k % w->group ? *sum : 0.0f);
        scales[k / block * rows] = scale;
    }
}

static void prepare_row(int precision, const kern_weight *w, const kern_rows *x, int64_t row,
                        int64_t block, int rows, uint32_t *words, float *scales, float *sums) {
    if (block == 32) /* all but int16 in long groups */
        prepare_blocks(precision, w, x, row, 32, rows, words, scales, sums);
    else
        prepare_blocks(HIGH, w, x, row, block, rows, words, scales, sums);
}

static void put_outputs(int dtype, int64_t count, const float *out, int64_t at, void *y) {
    uint16_t *halves = (uint16_t *)y + at;
    if (dtype == FLOAT32) memcpy((float *)y + at, out, count * sizeof(float));
    if (dtype == FLOAT16)
        for (int64_t i = 0; i < count; i++) halves[i] = to_float16(out[i]);
    if (dtype == BFLOAT16)
        for (int64_t i = 0; i < count; i++) halves[i] = to_bfloat16(out[i]);
}
