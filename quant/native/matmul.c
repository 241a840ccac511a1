/* y = x W^T: prepares the activations, and shares the tiles among the threads.
 *
 * Every output is computed by one thread in an order that depends on nothing but its row, its
 * column and the number of rows, so the result is the same for any number of threads. */
#include "kern.h"

#include <stdlib.h>
#include <string.h>

#define PANEL_WORDS 256        /* of an output: 16 KB a tile, half of the first cache */
#define PANEL_TILES 8          /* tiles whose sums stay in the second cache */
#define PANEL_ROWS 264         /* rows whose inputs of a panel stay there too */
#define ROWS_BYTES (256 << 10) /* activations that stay in the second cache */
#define SERIAL_WORK (1 << 16)  /* products that are not worth a second thread */
#define MOST_ROWS 16           /* of a block */
#define MOST_PANEL_TILES 2

typedef struct {
    const kern_isa *isa;
    int precision, by_panel, most; /* rows of a block, all but the last */
    const kern_weight *w;
    kern_input input;
    uint32_t *words; /* where `prepare` puts its results */
    float *scales, *sums;
    kern_rows x;
    int64_t m;
    void *y;
} job;

/* From more rows on, unpacking the codes once is worth its time. */
static int64_t most_tile_rows(int precision, int bits) {
    return bits == 8 ? 4 : precision == EXACT ? 8 : precision == HIGH ? 32 : 64;
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static int inputs_of_a_word(const job *j) {
    return j->precision == EXACT ? 1 : j->precision == HIGH ? 2 : 4;
}

static int64_t words_of(const job *j) { return j->w->k / inputs_of_a_word(j); }

/* The blocks of rows begin..end-1 as words. */
static void prepare(int64_t begin, int64_t end, void *context) {
    const job *j = context;
    const int64_t k = j->w->k, blocks = k / j->input.block, groups = k / j->w->group;
    for (int64_t row = begin * j->most; row < least(end * j->most, j->m); row++) {
        const int64_t first = row / j->most * j->most;
        const int rows = (int)least(j->most, j->m - first);
        j->isa->prepare(j->by_panel && j->precision == EXACT ? PLAIN : j->precision, j->w, &j->x,
                        row, j->input.block, rows,
                        j->words + first * words_of(j) + (row - first),
                        j->scales + first * blocks + (row - first),
                        j->sums + first * groups + (row - first));
    }
}

/* Copy the outputs of a row in tiles tile..end-1 that exist. */
static void put(const job *j, int64_t tile, int64_t end, int64_t row, const float *out) {
    const int64_t count = least(end * TILE, j->w->n) - tile * TILE;
    j->isa->put((int)j->x.dtype, count, out, row * j->w->n + tile * TILE, j->y);
}

static void tiles(int64_t begin, int64_t end, void *context) {
    const job *j = context;
    const int64_t fit = ROWS_BYTES / (words_of(j) * 4) / j->most * j->most;
    const int64_t step = fit > j->most ? fit : j->most;
    float out[MOST_ROWS * TILE];
    for (int64_t start = 0; start < j->m; start += step)
        for (int64_t tile = begin; tile < end; tile++)
            for (int64_t row = start; row < least(start + step, j->m); row += j->most) {
                int rows = (int)least(j->most, j->m - row);
                j->isa->tile(j->precision, rows, j->w, tile, &j->input, row, out);
                for (int r = 0; r < rows; r++) put(j, tile, tile + 1, row + r, out + r * TILE);
            }
}

/* totals (rows first..last-1, width) += their inputs of one panel times its tiles. */
static void add_panel(const job *j, const kern_panel *p, int64_t first, int64_t last, float *totals,
                      float *open) {
    const int width = j->isa->panel_tiles * TILE;
    j->isa->unpack(j->precision, p);
    for (int64_t row = first; row < last; row += j->most) {
        int64_t at = (row - first) * width;
        j->isa->multiply(j->precision, (int)least(j->most, last - row), p, &j->input, row,
                         totals + at, open + at);
    }
}

/* The outputs of tiles begin..end-1 for some rows. */
static void put_rows(const job *j, int64_t begin, int64_t end, int64_t first, int64_t last,
                     const float *totals) {
    const int wide = j->isa->panel_tiles;
    for (int64_t row = first; row < last; row++)
        for (int64_t t = begin; t < end; t += wide)
            put(j, t, least(t + wide, end), row,
                totals + ((t - begin) * PANEL_ROWS + (row - first) * wide) * TILE);
}

/* Tiles begin..end-1 for some rows, whose sums stay in cache from one panel of inputs to the next.
 */
static void panel_block(const job *j, int64_t begin, int64_t end, int64_t first, int64_t last) {
    enum { SUMS = PANEL_TILES * TILE * PANEL_ROWS };
    const int wide = j->isa->panel_tiles;
    const int64_t inputs = PANEL_WORDS * inputs_of_a_word(j);
    const int64_t step = inputs / j->input.block * j->input.block;
    _Alignas(LINE) uint32_t words[PANEL_WORDS * MOST_PANEL_TILES * TILE];
    _Alignas(LINE) float totals[SUMS], open[SUMS];
    memset(totals, 0, sizeof totals);
    if (end - begin < wide) memset(words, 0, sizeof words);
    for (int64_t k = 0; k < j->w->k; k += step)
        for (int64_t t = begin; t < end; t += wide) {
            kern_panel p = {j->w, t, k, least(k + step, j->w->k), (int)least(wide, end - t), words};
            int64_t at = (t - begin) * TILE * PANEL_ROWS;
            add_panel(j, &p, first, last, totals + at, open + at);
        }
    put_rows(j, begin, end, first, last, totals);
}

static void panels(int64_t begin, int64_t end, void *context) {
    const job *j = context;
    const int64_t passes = (j->m + PANEL_ROWS - 1) / PANEL_ROWS;
    const int64_t step = (j->m + passes * j->most - 1) / (passes * j->most) * j->most;
    for (int64_t row = 0; row < j->m; row += step)
        for (int64_t t = begin; t < end; t += PANEL_TILES)
            panel_block(j, t, least(t + PANEL_TILES, end), row, least(row + step, j->m));
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
    const int64_t words = j->m * words_of(j), scales = j->m * (j->w->k / j->input.block);
    const int64_t sums = j->m * (j->w->k / j->w->group);
    uint32_t *room = malloc((words + scales + sums) * 4);
    if (!room) return NULL;
    j->words = room;
    j->scales = (float *)(room + words);
    j->sums = (float *)(room + words + scales);
    j->input.words = j->words;
    j->input.scales = j->scales;
    j->input.sums = j->sums;
    return room;
}

int kern_matmul(const kern_call *call) {
    const kern_weight *w = call->w;
    const int64_t m = call->m;
    int precision = (int)call->precision;
    if (m == 0 || w->n == 0) return 0;
    if (w->bits == 8 && precision == FAST) precision = HIGH; /* products of bytes would saturate */
    job j = {.isa = kern_active(),
             .precision = precision,
             .w = w,
             .x = call->x,
             .m = m,
             .y = call->y};
    j.by_panel = j.isa->panel_rows[precision] && m > most_tile_rows(precision, w->bits);
    j.most = j.by_panel     ? j.isa->panel_rows[precision]
             : w->bits == 8 ? 1
                            : j.isa->tile_rows[precision];
    j.input.block = block_of(precision, w->group);
    void *room = make_room(&j);
    if (!room) return -1;
    kern_parallel((m + j.most - 1) / j.most, 1 + SERIAL_WORK / w->k / j.most, prepare, &j);
    const int64_t count = (w->n + TILE - 1) / TILE, grain = 1 + SERIAL_WORK / (w->k * TILE * m);
    kern_parallel(count, grain, j.by_panel ? panels : tiles, &j);
    free(room);
    return 0;
}
