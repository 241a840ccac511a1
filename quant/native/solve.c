/* The solver's interface: one block of columns of GPTQ for all rows, shared among the threads. */
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
