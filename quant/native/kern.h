/* The library's interface: y = x W^T for a packed quantized W (n outputs, k inputs).
 *
 *     W[c][i] = scale[c][g] * (code[c][i] - zero[c][g]),   g = i / group
 *
 * Packed layout. 16 outputs make a tile; a tile's codes are lines of 64 bytes, in the order of k.
 * Up to 4 bits a line holds 8 inputs: byte 4c+j of a line has input j of output c in its low and
 * input 4+j in its high nibble. With 8 bits a line holds 4 inputs: byte 4c+j has input j. So one
 * 32-bit lane is one output, whatever the vector's width, and no instruction set needs a permute.
 * Scales and zeros lie beside: tiles x groups x 16. n is padded to 16, k to 32 in each group.
 */
#ifndef KERN_H
#define KERN_H

#include <stdint.h>

#define TILE 16
#define LINE 64

enum dtype { FLOAT32, FLOAT16, BFLOAT16 };
enum precision { EXACT, HIGH, FAST, PLAIN }; /* PLAIN: inputs of a panel, not for callers */

typedef struct {
    const uint8_t *codes;   /* tiles x (k * bytes per input) x 16, 64-byte aligned */
    const uint16_t *scales; /* float16, tiles x groups x 16 */
    const uint8_t *zeros;   /* tiles x groups x 16, or one for all */
    int64_t n, k, group;    /* outputs (not padded), inputs (padded), inputs per scale */
    int32_t bits, one_zero; /* stored width, 4 or 8; whether `zeros` is a single one */
} kern_weight;

/* Rows of inputs. gather: for each of the w->k padded inputs its column, or -1 for padding; NULL: a
 * row has w->k columns, in order. */
typedef struct {
    const void *rows;
    const int32_t *gather;
    int64_t apart, dtype; /* elements from a row to the next */
} kern_rows;

/* y (m, w->n) = x times w, in the dtype of x. */
typedef struct {
    const kern_weight *w;
    kern_rows x;
    void *y;
    int64_t m, precision;
} kern_call;

/* Activations as a precision wants them, in words of 4 bytes: one float, two int16 or four int8
 * inputs. A block of rows stands together, word by word: word i of its row r is
 * words[i * rows + r], so that a kernel reads all its rows in one stream; scales and sums likewise.
 * Rows before `row` take row * (words of a row) words, whatever their blocks.
 * Floats are mixed as the tiles want them (mix_inputs), or plain for panels.
 * int16 inputs are permuted within each 8 to 0 2 4 6 1 3 5 7, the order in which shifting a line
 * gives its codes. */
typedef struct {
    const uint32_t *words;
    const float *scales; /* of each row and block of inputs */
    const float *sums;   /* of each row and group: its integers times their scales */
    int64_t block;       /* inputs per scale */
} kern_input;

/* The inputs start..end-1 of some tiles, unpacked for many rows: for each word of activations, the
 * codes (or in EXACT the weights, as floats) of one output after another. */
typedef struct {
    const kern_weight *w;
    int64_t tile, start, end;
    int tiles; /* at most panel_tiles; words are 16 * panel_tiles apart whatever it is */
    uint32_t *words;
} kern_panel;

/* One block of columns of a weight that GPTQ rounds; matrices (columns, rows), rows contiguous. */
#define SOLVE_MOST_COLUMNS 256
typedef struct {
    const float *values;         /* the weight with the errors of all earlier blocks */
    const float *original;       /* the weight itself */
    const float *ratio;          /* (columns, columns): [j][i] weighs the error of i < j in j */
    const float *judged;         /* (2, columns): s, d of the loss */
    const float *scales, *zeros; /* (groups, rows) */
    const int64_t *groups;       /* of each column */
    uint8_t *codes;              /* out */
    float *errors;               /* out: original - scale * (code - zero) */
    float *losses;               /* out, of each row: sum of s (v - q)^2 - d error^2 */
    int64_t columns, rows;
    float max_code;
} kern_block;

/* The search for the scales and zeros of least weighted error, see search.h. */
typedef struct {
    const float *weights, *importance; /* (rows, columns), (columns) */
    const float *coarse, *fine;        /* fractions of the scale to try */
    float *scales, *zeros;             /* (rows, columns / width): the start in, the best out */
    int64_t rows, columns, width, coarse_count, fine_count;
    int32_t shift; /* how far zeros may move */
    float max_code;
} kern_search;

/* out (m, n) = alpha A^T B for A (k, m), B (k, n) in float32; out's rows are contiguous. */
typedef struct {
    const float *a, *b;
    float *out;
    int64_t m, n, k;
    int64_t a_row, a_column, b_row, b_column, out_row; /* distances between neighbours, in floats */
    float alpha;
    int32_t add;   /* to what out holds */
    int32_t upper; /* only where column >= row must be right; m = n */
    int32_t half;  /* B, n = k, is symmetric: take blocks on its diagonal half, those below as 0 */
    const float *with; /* (m, n) contiguous: out (m / group, n) sums products with it */
    int64_t group;     /* over so many rows; 0 if without */
} kern_product;

/* One instruction set. `tile` takes blocks of tile_rows[precision] rows, `multiply` panel_rows; the
 * last block may have fewer. Where panel_rows are 0 there are no panels. */
typedef struct {
    const char *name;
    int tile_rows[3], panel_rows[3], panel_tiles;
    /* One row of x -> its place in a block of `rows` rows. */
    void (*prepare)(int precision, const kern_weight *w, const kern_rows *x, int64_t row,
                    int64_t block, int rows, uint32_t *words, float *scales, float *sums);
    /* `count` outputs to y[at], y[at + 1], ... in their dtype. */
    void (*put)(int dtype, int64_t count, const float *out, int64_t at, void *y);
    /* out (rows, 16) = a block of rows of x times one tile. */
    void (*tile)(int precision, int rows, const kern_weight *w, int64_t tile, const kern_input *x,
                 int64_t row, float *out);
    /* Fill in a panel's words. */
    void (*unpack)(int precision, const kern_panel *p);
    /* totals (rows, 16 * panel_tiles) += a block of rows of x times a panel. In an integer
     * precision `open`, of the same shape, holds the sums of a group that panels share. */
    void (*multiply)(int precision, int rows, const kern_panel *p, const kern_input *x, int64_t row,
                     float *totals, float *open);
    /* GPTQ's loop for rows begin..end-1, at most 32. */
    void (*round_rows)(const kern_block *b, int64_t begin, int64_t end);
    /* The grids of one row. */
    void (*search_row)(const kern_search *s, int64_t row);
} kern_isa;

extern const kern_isa kern_scalar, kern_avx2, kern_avxvnni, kern_avx512, kern_neon;

typedef void (*kern_range)(int64_t begin, int64_t end, void *context);
void kern_parallel(int64_t count, int64_t grain, kern_range body, void *context);

const kern_isa *kern_active(void);

#if defined(_WIN32)
#define KERN_API __declspec(dllexport)
#else
#define KERN_API __attribute__((visibility("default")))
#endif

/* KERN_INTERFACE, by which callers know that structs and functions are those of their own sources.
 * It counts the changes to what stands in this file for callers. */
#define KERN_INTERFACE 2
KERN_API int kern_interface(void);
/* The names of the usable instruction sets, best first, separated by spaces. */
KERN_API const char *kern_available(void);
/* Use the instruction set of that name, or the best for NULL. 0, or -1 if it cannot run here. */
KERN_API int kern_select(const char *name);
KERN_API const char *kern_selected(void);
/* Run on the pool behind `parallel_for` (torch_parallel_for of libtorch); NULL: own threads. */
KERN_API void kern_use_pool(void *parallel_for, int threads);

/* 0, or -1 when memory is short. */
KERN_API int kern_matmul(const kern_call *call);

/* Round one block of columns. 0, or -1 where it has more than SOLVE_MOST_COLUMNS. */
KERN_API int kern_round_block(const kern_block *b);

KERN_API void kern_fit_scales(const kern_search *s);

/* 0, or -1 when memory is short, or where there are no panels. */
KERN_API int kern_multiply(const kern_product *p);

#endif
