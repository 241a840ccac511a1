/* The grid of least weighted error for the groups of one row; compiled for each instruction set.
 *
 *     loss(s, z) = s^2 sum over i of h_i (w_i / s - c_i)^2,   c_i = round(clamp(w_i / s, -z, top - z))
 *
 * Candidates are fractions of the scale the search starts from, then of the best so far, then the
 * least-squares fit to the codes found; each is rounded to float16 before it is judged. */
#include <string.h>

#define SEARCH_LANES 16 /* sums side by side; groups are whole multiples of 32 wide */

typedef struct {
    const float *w, *h;
    int64_t width;
    float top;
    float scale, zero, loss; /* the best so far */
} search_group;

/* The nearest float16 of a scale between the least and the largest, the sign kept. */
static inline float half_scale(float scale) {
    float size = scale < 0 ? -scale : scale;
    size = size < 0x1p-24f ? 0x1p-24f : size > 65504.0f ? 65504.0f : size;
    if (size < 0x1p-14f) {
        size = (size + 0.75f) - 0.75f; /* a multiple of 2^-24, as numbers below 2^-14 are */
    } else {
        uint32_t bits;
        memcpy(&bits, &size, 4);
        bits = (bits + 0xfff + (bits >> 13 & 1)) & ~0x1fffu;
        memcpy(&size, &bits, 4);
    }
    return scale < 0 ? -size : size;
}

/* Code minus the zero: the nearest integer in low..high. */
static inline float search_code(float steps, float low, float high) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it leaves the nearest integer, ties even */
    steps = steps < low ? low : steps;
    steps = steps > high ? high : steps;
    return (steps + magic) - magic;
}

static inline float search_sum(const float *lanes) {
    float total = 0;
    for (int l = 0; l < SEARCH_LANES; l++) total += lanes[l];
    return total;
}

/* Take a candidate where it is better than what was found so far. */
static void search_try(search_group *g, float scale, float zero) {
    scale = half_scale(scale);
    const float inverse = 1.0f / scale, low = -zero, high = g->top - zero;
    float sums[SEARCH_LANES] = {0};
    for (int64_t i = 0; i < g->width; i += SEARCH_LANES)
        for (int l = 0; l < SEARCH_LANES; l++) {
            float steps = g->w[i + l] * inverse;
            float error = steps - search_code(steps, low, high);
            sums[l] += g->h[i + l] * (error * error);
        }
    const float loss = search_sum(sums) * (scale * scale);
    if (!(loss < g->loss)) return;
    g->scale = scale;
    g->zero = zero;
    g->loss = loss;
}

/* The best scale for the codes of the best grid; that of the grid where all are 0. */
static float search_fit(const search_group *g) {
    const float inverse = 1.0f / g->scale, low = -g->zero, high = g->top - g->zero;
    float products[SEARCH_LANES] = {0}, squares[SEARCH_LANES] = {0};
    for (int64_t i = 0; i < g->width; i += SEARCH_LANES)
        for (int l = 0; l < SEARCH_LANES; l++) {
            float w = g->w[i + l], c = search_code(w * inverse, low, high);
            float weighted = g->h[i + l] * c;
            products[l] += weighted * w;
            squares[l] += weighted * c;
        }
    const float square = search_sum(squares);
    return square > 0 ? search_sum(products) / square : g->scale;
}

static void search_row(const kern_search *s, int64_t row) {
    const int64_t groups = s->columns / s->width;
    for (int64_t group = 0; group < groups; group++) {
        const int64_t at = row * groups + group, column = group * s->width;
        const float scale = s->scales[at], zero = s->zeros[at];
        search_group g = {s->weights + row * s->columns + column, s->importance + column, s->width,
                          s->max_code, scale, zero, INFINITY};
        search_try(&g, scale, zero);
        for (int64_t i = 0; i < s->coarse_count; i++) search_try(&g, scale * s->coarse[i], zero);
        const float best_scale = g.scale, best_zero = g.zero;
        for (int shift = -s->shift; shift <= s->shift; shift++) {
            float moved = best_zero + (float)shift;
            moved = s->shift == 0 ? best_zero : moved < 1 ? 1 : moved > s->max_code ? s->max_code : moved;
            for (int64_t i = 0; i < s->fine_count; i++)
                search_try(&g, best_scale * s->fine[i], moved);
        }
        search_try(&g, search_fit(&g), g.zero);
        s->scales[at] = g.scale;
        s->zeros[at] = g.zero;
    }
}
