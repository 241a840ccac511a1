/* Activations to integers, one row; compiled for each instruction set, whose flags vectorize it.
 *
 * A block's scale is its largest magnitude / 127 or / 32767. Magnitudes are compared as integers:
 * the order is that of the floats, and a NaN stands above infinity, so one comparison finds both.
 * A block that holds one gets the scale NaN, which reaches every output of its row and no other.
 * Blocks below 2^-100 count as zero. Products and sums are not fused, so that every instruction set
 * rounds alike. */
#include <math.h>
#include <string.h>

#define MOST_BLOCK 256

static float quantize_block(const float *x, int64_t block, float top, int32_t *q, int32_t *sum) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it leaves the nearest integer */
    int32_t most = 0, total = 0;
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
    for (int64_t i = 0; i < block; i++) {
        float rounded = (x[i] * inverse + magic) - magic;
        q[i] = finite ? (int32_t)rounded : 0;
        total += q[i];
    }
    *sum = total;
    return !finite ? NAN : empty ? 0.0f : largest / top;
}

static void quantize_row(int precision, const float *x, int64_t k, int64_t block, void *row,
                         float *scales, int32_t *sums) {
    int32_t q[MOST_BLOCK];
    for (int64_t b = 0; b < k / block; b++) {
        const float top = precision == FAST ? 127.0f : 32767.0f;
        scales[b] = quantize_block(x + b * block, block, top, q, sums + b);
        if (precision == FAST) {
            int8_t *out = (int8_t *)row + b * block;
            for (int64_t i = 0; i < block; i++) out[i] = (int8_t)q[i];
            continue;
        }
        int16_t *out = (int16_t *)row + b * block;
        for (int64_t i = 0; i < block; i += 8)
            for (int j = 0; j < 4; j++) {
                out[i + j] = (int16_t)q[i + 2 * j];
                out[i + 4 + j] = (int16_t)q[i + 2 * j + 1];
            }
    }
}
