/* y = x W^T: prepares the activations, and shares the tiles among the threads.
 *
 * Every output is computed by one thread in an order that depends on nothing but its row and
 * column, so the result is the same for any number of threads. */
#include "kern.h"

#include <stdlib.h>
#include <string.h>

#define PANEL_K 256           /* inputs of a panel: 16 KB, half of the first cache */
#define ROWS_BYTES (192 << 10) /* activations that stay in the second cache */
#define EXACT_TILE_ROWS 8     /* up to here exact goes by tile, above by panel */
#define SERIAL_WORK (1 << 16) /* products that are not worth a second thread */

typedef struct {
    const kern_isa *isa;
    int precision;
    const kern_weight *w;
    kern_input input;
    float *scales, *gathered; /* where `prepare` puts its results */
    int32_t *sums;
    void *rows;
    const float *x;
    int64_t ldx, m;
    const int32_t *gather;
    float *y;
} job;

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Activations of rows begin..end-1, gathered and rounded to the precision's integers. */
static void prepare(int64_t begin, int64_t end, void *context) {
    const job *j = context;
    const int64_t k = j->w->k, blocks = k / j->input.block;
    for (int64_t row = begin; row < end; row++) {
        const float *x = j->x + row * j->ldx;
        if (j->gather) {
            float *copy = j->gathered + row * k;
            for (int64_t i = 0; i < k; i++) copy[i] = j->gather[i] < 0 ? 0.0f : x[j->gather[i]];
            x = copy;
        }
        if (j->precision == EXACT) continue;
        j->isa->quantize(j->precision, x, k, j->input.block,
                         (char *)j->rows + row * k * (j->precision == FAST ? 1 : 2),
                         j->scales + row * blocks, j->sums + row * blocks);
    }
}

/* Copy the outputs of a tile that exist. */
static void put(const job *j, int64_t tile, int64_t row, int rows, const float *out) {
    int64_t count = least(TILE, j->w->n - tile * TILE);
    for (int r = 0; r < rows; r++)
        memcpy(j->y + (row + r) * j->w->n + tile * TILE, out + r * TILE, count * sizeof(float));
}

/* Rows of activations that stay in cache while all tiles pass over them. */
static int64_t rows_at_once(const job *j, int most) {
    int64_t size = j->precision == FAST ? 1 : j->precision == HIGH ? 2 : 4;
    int64_t rows = ROWS_BYTES / (j->w->k * size) / most * most;
    return rows > most ? rows : most;
}

static void tiles(int64_t begin, int64_t end, void *context) {
    const job *j = context;
    const int most = j->isa->tile_rows[j->precision];
    const int64_t step = rows_at_once(j, most);
    float out[16 * TILE];
    for (int64_t start = 0; start < j->m; start += step)
        for (int64_t tile = begin; tile < end; tile++)
            for (int64_t row = start; row < least(start + step, j->m); row += most) {
                int rows = (int)least(most, least(start + step, j->m) - row);
                j->isa->tile(j->precision, rows, j->w, tile, &j->input, row, out);
                put(j, tile, row, rows, out);
            }
}

/* y += the inputs start..end-1 of rows of x times one tile as floats. */
static void add_panel(const job *j, int64_t tile, int64_t start, int64_t end, int64_t first_row,
                      int64_t last_row) {
    const int most = j->isa->panel_rows;
    const float *x = j->input.rows;
    float panel[PANEL_K * TILE], out[16 * TILE];
    int64_t count = least(TILE, j->w->n - tile * TILE);
    j->isa->panel(j->w, tile, start, end, panel);
    for (int64_t row = first_row; row < last_row; row += most) {
        int rows = (int)least(most, last_row - row);
        memset(out, 0, sizeof out);
        if (start)
            for (int r = 0; r < rows; r++)
                memcpy(out + r * TILE, j->y + (row + r) * j->w->n + tile * TILE,
                       count * sizeof(float));
        j->isa->multiply(rows, x + row * j->input.ld + start, j->input.ld, panel, end - start, out);
        put(j, tile, row, rows, out);
    }
}

static void panels(int64_t begin, int64_t end, void *context) {
    const job *j = context;
    const int64_t step = ROWS_BYTES / (PANEL_K * sizeof(float)) / j->isa->panel_rows *
                         j->isa->panel_rows;
    for (int64_t row = 0; row < j->m; row += step)
        for (int64_t k = 0; k < j->w->k; k += PANEL_K)
            for (int64_t tile = begin; tile < end; tile++)
                add_panel(j, tile, k, least(k + PANEL_K, j->w->k), row, least(row + step, j->m));
}

/* The largest block of int16 activations: a sum of 256 products with 8-bit codes fits 31 bits. */
static int64_t block_of(int precision, int64_t group) {
    if (precision != HIGH) return 32;
    for (int64_t block = 256; block > 32; block -= 32)
        if (group % block == 0) return block;
    return 32;
}

/* Room for the prepared activations; NULL when memory is short. */
static void *make_room(job *j) {
    const int64_t k = j->w->k, values = j->m * (j->w->k / j->input.block);
    const int64_t gathered = j->gather ? j->m * k * 4 : 0;
    const int64_t rows = j->precision == EXACT ? 0 : j->m * k * (j->precision == FAST ? 1 : 2);
    char *room = malloc(gathered + rows + 2 * values * 4 + 4);
    j->gathered = (float *)room;
    j->scales = (float *)(room + gathered);
    j->sums = (int32_t *)(room + gathered + values * 4);
    j->rows = room + gathered + 2 * values * 4;
    j->input.rows = j->precision == EXACT ? (j->gather ? j->gathered : j->x) : j->rows;
    j->input.ld = j->precision == EXACT && !j->gather ? j->ldx : k;
    j->input.scales = j->scales;
    j->input.sums = j->sums;
    return room;
}

int kern_matmul(int precision, const kern_weight *w, const float *x, int64_t ldx,
                const int32_t *gather, int64_t m, float *y) {
    if (m == 0 || w->n == 0) return 0;
    if (w->bits == 8 && precision == FAST) precision = HIGH; /* products of bytes would saturate */
    job j = {.isa = kern_active(), .precision = precision, .w = w, .x = x, .ldx = ldx, .m = m,
             .gather = gather, .y = y};
    j.input.block = block_of(precision, w->group);
    void *room = make_room(&j);
    if (!room) return -1;
    if (precision != EXACT || gather) kern_parallel(m, 1 + SERIAL_WORK / w->k, prepare, &j);
    const int64_t count = (w->n + TILE - 1) / TILE;
    const int64_t grain = 1 + SERIAL_WORK / (w->k * TILE * m);
    kern_parallel(count, grain, precision == EXACT && m > EXACT_TILE_ROWS ? panels : tiles, &j);
    free(room);
    return 0;
}
