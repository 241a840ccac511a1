/* out = or += alpha A^T B in float32, for A (k, m) and B (k, n) of any strides: what torch's own
 * products leave of the machine's arithmetic.
 *
 * Both are copied, DEPTH of k at a time, into the order in which `multiply` reads them: A in blocks
 * of panel_rows columns, B in panels of a fixed width. Every output is summed by one thread in the
 * order of k, so results do not depend on the number of threads, nor on where a row stands. */
#include "kern.h"

#include <stdlib.h>
#include <string.h>

#define DEPTH 384      /* of k: a panel of B stays in the first cache; a multiple of any width */
#define BLOCK_ROWS 264 /* of out: their part of A stays in the second cache */
#define BLOCK_PANELS 8
#define MOST_ROWS 16
#define MOST_WIDTH 32

typedef struct {
    const kern_product *p;
    const kern_isa *isa;
    int64_t rows, width; /* of a block of A, of a panel of B */
    int64_t start, depth;
    float *a, *b;
} job;

static int64_t least(int64_t x, int64_t y) { return x < y ? x : y; }

static int64_t parts(int64_t count, int64_t size) { return (count + size - 1) / size; }

/* `count` columns of a matrix, `depth` rows of them: to (depth, width), the rest 0. */
static void pack(const float *from, int64_t row, int64_t column, int64_t depth, int64_t count,
                 int64_t width, float factor, float *to) {
    if (count < width) memset(to, 0, depth * width * sizeof(float));
    if (column == 1) {
        for (int64_t k = 0; k < depth; k++)
            for (int64_t c = 0; c < count; c++) to[k * width + c] = factor * from[k * row + c];
        return;
    }
    for (int64_t first = 0; first < depth; first += 16) /* a line of each column at a time */
        for (int64_t c = 0; c < count; c++)
            for (int64_t k = first; k < least(first + 16, depth); k++)
                to[k * width + c] = factor * from[k * row + c * column];
}

static void pack_a(int64_t begin, int64_t end, void *context) {
    const job *j = context;
    const kern_product *p = j->p;
    for (int64_t block = begin; block < end; block++) {
        int64_t first = block * j->rows, count = least(j->rows, p->m - first);
        pack(p->a + j->start * p->a_row + first * p->a_column, p->a_row, p->a_column, j->depth,
             count, count, p->alpha, j->a + first * j->depth);
    }
}

/* Whether a panel is left out at this depth. */
static int below(const job *j, int64_t column) { return j->p->half && column < j->start; }

static void pack_b(int64_t begin, int64_t end, void *context) {
    const job *j = context;
    const kern_product *p = j->p;
    for (int64_t panel = begin; panel < end; panel++) {
        int64_t first = panel * j->width;
        if (below(j, first)) continue;
        const float factor = p->half && first < j->start + j->depth ? 0.5f : 1.0f;
        pack(p->b + j->start * p->b_row + first * p->b_column, p->b_row, p->b_column, j->depth,
             least(j->width, p->n - first), j->width, factor, j->b + first * j->depth);
    }
}

/* One block of out from a block of A and a panel of B. */
static void tile(const job *j, int64_t row, int64_t column) {
    const kern_product *p = j->p;
    const int64_t rows = least(j->rows, p->m - row), columns = least(j->width, p->n - column);
    float sums[MOST_ROWS * MOST_WIDTH] = {0};
    const kern_weight shape = {.k = j->depth};
    const kern_input a = {.words = (const uint32_t *)j->a};
    const kern_panel b = {.w = &shape, .end = j->depth, .words = (uint32_t *)(j->b + column * j->depth)};
    j->isa->multiply(EXACT, (int)rows, &b, &a, row, sums, NULL);
    const int add = p->add || j->start;
    for (int64_t r = 0; r < rows; r++) {
        const float *sum = sums + r * j->width;
        if (p->group) {
            float *out = p->out + (row + r) / p->group * p->out_row + column;
            const float *with = p->with + (row + r) * p->n + column;
            for (int64_t c = 0; c < columns; c++) out[c] += with[c] * sum[c];
            continue;
        }
        float *out = p->out + (row + r) * p->out_row + column;
        if (add)
            for (int64_t c = 0; c < columns; c++) out[c] += sum[c];
        else
            memcpy(out, sum, columns * sizeof(float));
    }
}

/* Items of work: BLOCK_ROWS rows by BLOCK_PANELS panels. Where rows add up, all by a few. */
static int64_t wide(const job *j) {
    return (j->p->group ? BLOCK_PANELS / 2 : BLOCK_PANELS) * j->width;
}

static int64_t tall(const job *j) { return BLOCK_ROWS / j->rows * j->rows; }

static int64_t item_count(const job *j) {
    return parts(j->p->n, wide(j)) * (j->p->group ? 1 : parts(j->p->m, tall(j)));
}

static void block(const job *j, int64_t top, int64_t left) {
    const kern_product *p = j->p;
    for (int64_t column = left; column < least(left + wide(j), p->n); column += j->width)
        for (int64_t row = top; row < least(top + tall(j), p->m); row += j->rows)
            if ((!p->upper || row < column + j->width) && !below(j, column)) tile(j, row, column);
}

static void items(int64_t begin, int64_t end, void *context) {
    const job *j = context;
    const kern_product *p = j->p;
    const int64_t across = parts(p->n, wide(j)), count = item_count(j);
    for (int64_t turn = begin; turn < end; turn++) {
        /* From both ends, since the upper triangle has its work at the start. */
        const int64_t item = turn % 2 ? count - 1 - turn / 2 : turn / 2;
        int64_t top = item / across * tall(j);
        const int64_t bottom = p->group ? p->m : top + 1;
        for (; top < bottom; top += tall(j)) block(j, top, item % across * wide(j));
    }
}

int kern_multiply(const kern_product *p) {
    job j = {.p = p, .isa = kern_active()};
    j.rows = j.isa->panel_rows[EXACT];
    j.width = j.isa->panel_tiles * TILE;
    if (!j.rows) return -1;
    const int64_t blocks = parts(p->m, j.rows), panels = parts(p->n, j.width);
    const int64_t depth = least(DEPTH, p->k);
    j.a = malloc((p->m + panels * j.width) * depth * sizeof(float));
    if (!j.a) return -1;
    j.b = j.a + p->m * depth;
    if (p->group)
        for (int64_t row = 0; row < p->m / p->group; row++)
            memset(p->out + row * p->out_row, 0, p->n * sizeof(float));
    for (j.start = 0; j.start < p->k; j.start += DEPTH) {
        j.depth = least(DEPTH, p->k - j.start);
        kern_parallel(blocks, 8, pack_a, &j);
        kern_parallel(panels, 4, pack_b, &j);
        kern_parallel(item_count(&j), 1, items, &j);
    }
    free(j.a);
    return 0;
}
