/* GPTQ's column loop over some rows of a weight; compiled for each instruction set.
 *
 * A tile of 32 rows goes through all columns of the block by itself, its errors in the first cache:
 * one lane is one row, rows never meet. Column j first receives the errors of the columns before
 * it, then is rounded:
 *     v = values[j] + sum over i < j of error[i] * ratio[i][j]
 *     code = clamp(round(v / scale) + zero),  q = scale * (code - zero),  error[j] = original[j] - q
 * Products and sums are not fused, so every instruction set gives the same codes. */
#include <string.h>

#define SOLVE_ROWS 32
#ifdef __AVX512F__
#define SOLVE_LANES 16
#else
#define SOLVE_LANES 8
#endif
#define SOLVE_VECTORS (SOLVE_ROWS / SOLVE_LANES)
#define EVERY(v) for (int v = 0; v < SOLVE_VECTORS; v++)

typedef float lanes __attribute__((vector_size(4 * SOLVE_LANES)));
typedef struct {
    lanes of[SOLVE_VECTORS];
} rows32;

/* `count` floats, the rest of the tile `rest`. */
static inline void load_floats(float *to, const float *from, int64_t count, float rest) {
    if (count == SOLVE_ROWS) {
        memcpy(to, from, 4 * SOLVE_ROWS);
        return;
    }
    for (int64_t r = 0; r < SOLVE_ROWS; r++) to[r] = r < count ? from[r] : rest;
}

static inline rows32 load_rows(const float *from, int64_t count) {
    rows32 x;
    load_floats((float *)&x, from, count, 0);
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

/* Round one column of a tile; its codes go out, its errors stay, its loss is added. */
static inline rows32 round_column(const kern_block *b, int64_t j, int64_t row, int64_t count,
                                  rows32 sum, float *losses) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it leaves the nearest integer, ties even */
    const float limit = 4194304.0f;  /* up to where that holds */
    const int64_t at = j * b->rows + row, grid = b->groups[j] * b->rows + row;
    const float square = b->judged[j], added = b->judged[b->columns + j];
    float scale[SOLVE_ROWS], zero[SOLVE_ROWS], original[SOLVE_ROWS];
    float value[SOLVE_ROWS], code[SOLVE_ROWS], error[SOLVE_ROWS];
    uint8_t bytes[SOLVE_ROWS];
    load_floats(scale, b->scales + grid, count, 1);
    load_floats(zero, b->zeros + grid, count, 0);
    load_floats(original, b->original + at, count, 0);
    memcpy(value, &sum, sizeof value);
    for (int r = 0; r < SOLVE_ROWS; r++) {
        float steps = value[r] * (1.0f / scale[r]);
        steps = steps < -limit ? -limit : steps;
        steps = steps > limit ? limit : steps;
        float rounded = (steps + magic) - magic + zero[r];
        rounded = rounded < 0 ? 0 : rounded;
        code[r] = rounded > b->max_code ? b->max_code : rounded;
        rounded = scale[r] * (code[r] - zero[r]);
        error[r] = original[r] - rounded;
        float moved = value[r] - rounded;
        losses[r] += square * (moved * moved) - added * (error[r] * error[r]);
    }
    for (int r = 0; r < SOLVE_ROWS; r++) bytes[r] = (uint8_t)(int32_t)code[r];
    if (count == SOLVE_ROWS) {
        memcpy(b->codes + at, bytes, SOLVE_ROWS);
        memcpy(b->errors + at, error, 4 * SOLVE_ROWS);
    } else {
        memcpy(b->codes + at, bytes, count);
        memcpy(b->errors + at, error, 4 * count);
    }
    return load_rows(error, SOLVE_ROWS);
}

/* Rows begin..end-1, at most 32 of them. */
static void round_rows(const kern_block *b, int64_t begin, int64_t end) {
    rows32 errors[SOLVE_MOST_COLUMNS];
    float losses[SOLVE_ROWS] = {0};
    const int64_t count = end - begin;
    for (int64_t j = 0; j < b->columns; j++) {
        rows32 sum = load_rows(b->values + j * b->rows + begin, count);
        sum = corrected(sum, errors, b->ratio + j * b->columns, j);
        errors[j] = round_column(b, j, begin, count, sum, losses);
    }
    memcpy(b->losses + begin, losses, 4 * count);
}
