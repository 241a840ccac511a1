/* GPTQ's column loop over some rows of a weight; compiled for each instruction set.
 *
 * A tile of 32 rows goes through all columns of the block by itself, its errors in the first cache:
 * one lane is one row, rows never meet. Column j first receives the errors of the columns before
 * it, then is rounded:
 *     v = values[j] + sum over i < j of error[i] * ratio[i][j]
 *     code = clamp(round(v / scale) + zero),  error[j] = original[j] - scale * (code - zero)
 * Products and sums are not fused, so every instruction set gives the same codes. */
#include <string.h>

#define SOLVE_ROWS 32
#define SOLVE_LANES 8
#define SOLVE_VECTORS (SOLVE_ROWS / SOLVE_LANES)
#define EVERY(v) for (int v = 0; v < SOLVE_VECTORS; v++)

typedef float lanes __attribute__((vector_size(4 * SOLVE_LANES)));
typedef struct {
    lanes of[SOLVE_VECTORS];
} rows32;

/* `count` floats, the rest of the tile 0. */
static inline rows32 load_rows(const float *p, int64_t count) {
    rows32 x;
    if (count < SOLVE_ROWS) memset(&x, 0, sizeof x);
    memcpy(&x, p, 4 * (count < SOLVE_ROWS ? count : SOLVE_ROWS));
    return x;
}

/* Errors of the columns before j, each times its ratio, added to the column's values. */
static inline rows32 corrected(rows32 sum, const rows32 *errors, const float *ratio, int64_t j) {
    rows32 odd;
    memset(&odd, 0, sizeof odd); /* a second chain of additions, since one waits for itself */
    int64_t i = 0;
    for (; i + 1 < j; i += 2) {
        EVERY(v) sum.of[v] += errors[i].of[v] * ratio[i];
        EVERY(v) odd.of[v] += errors[i + 1].of[v] * ratio[i + 1];
    }
    if (i < j) EVERY(v) sum.of[v] += errors[i].of[v] * ratio[i];
    EVERY(v) sum.of[v] += odd.of[v];
    return sum;
}

/* Round one column of a tile; its codes go out, its errors stay. */
static inline rows32 round_column(const kern_block *b, int64_t j, int64_t row, int64_t count,
                                  rows32 sum) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it leaves the nearest integer, ties even */
    const float limit = 4194304.0f;  /* up to where that holds */
    const int64_t at = j * b->rows + row;
    float value[SOLVE_ROWS], code[SOLVE_ROWS], error[SOLVE_ROWS];
    memcpy(value, &sum, sizeof value);
    for (int64_t r = 0; r < count; r++) {
        float scale = b->scales[at + r], zero = b->zeros[at + r];
        float steps = value[r] * (1.0f / scale);
        steps = steps < -limit ? -limit : steps > limit ? limit : steps;
        float rounded = (steps + magic) - magic + zero;
        code[r] = rounded < 0 ? 0 : rounded > b->max_code ? b->max_code : rounded;
        error[r] = b->original[at + r] - scale * (code[r] - zero);
    }
    for (int64_t r = 0; r < count; r++) b->codes[at + r] = (uint8_t)code[r];
    memcpy(b->errors + at, error, 4 * count);
    return load_rows(error, count);
}

/* Rows begin..end-1, at most 32 of them. */
static void round_rows(const kern_block *b, int64_t begin, int64_t end) {
    rows32 errors[SOLVE_MOST_COLUMNS];
    const int64_t count = end - begin;
    for (int64_t j = 0; j < b->columns; j++) {
        rows32 sum = load_rows(b->values + j * b->rows + begin, count);
        sum = corrected(sum, errors, b->ratio + j * b->columns, j);
        errors[j] = round_column(b, j, begin, count, sum);
    }
}
