/* The solver's interface: one block of columns of GPTQ, and the search for scales, for all rows,
 * shared among the threads. */
#include "kern.h"

#define ROWS_OF_A_TILE 32

static void tiles_of_rows(int64_t begin, int64_t end, void *context) {
    const kern_block *b = context;
    for (int64_t tile = begin; tile < end; tile++) {
        int64_t last = (tile + 1) * ROWS_OF_A_TILE;
        kern_active()->round_rows(b, tile * ROWS_OF_A_TILE, last < b->rows ? last : b->rows);
    }
}

int kern_round_block(const kern_block *b) {
    if (b->columns > SOLVE_MOST_COLUMNS) return -1;
    kern_parallel((b->rows + ROWS_OF_A_TILE - 1) / ROWS_OF_A_TILE, 1, tiles_of_rows, (void *)b);
    return 0;
}

static void rows_of_groups(int64_t begin, int64_t end, void *context) {
    for (int64_t row = begin; row < end; row++) kern_active()->search_row(context, row);
}

void kern_fit_scales(const kern_search *s) {
    kern_parallel(s->rows, 1 + (1 << 12) / s->columns, rows_of_groups, (void *)s);
}
