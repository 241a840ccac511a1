/* Many rows: the codes of a tile are unpacked once, into a panel that all rows are multiplied by.
 *
 * Word i of a panel stands against word i of the activations: one input as a float, two as int16
 * codes or four as bytes, of the 16 outputs of a tile. PANEL_TILES tiles stand side by side. */
#define WIDE (VECTORS * PANEL_TILES)
#define WIDTH (TILE * PANEL_TILES) /* words from one word of an output to its next */
/* Bytes from a code to the one that the next panel has in its place. */
#define NEXT_PANEL(w) ((w)->k * TILE * PANEL_TILES * (w)->bits / 8)

INLINE void unpack_floats(int bits, const kern_panel *p, int64_t tile, uint32_t *out) {
    const int per_line = 32 / bits;
    const kern_weight *w = p->w;
    const uint8_t *line = w->codes + (tile * w->k + p->start) * TILE * bits / 8;
    for (int64_t k = p->start; k < p->end; out += per_line * WIDTH, k += per_line, line += LINE) {
        group_grid grid = load_grid(w, tile, k / w->group);
        prefetch(line + NEXT_PANEL(w));
        EACH(v, VECTORS) {
            vi raw = load(PART(line, v));
            EACH(i, per_line) {
                /* nibbles 0..7 of a lane are inputs 0 4 1 5 2 6 3 7 */
                const int input = bits == 8 ? i : 0x73625140 >> 4 * i & 7;
                vf code = to_f(field(raw, bits * i, (1 << bits) - 1));
                vf weight = mul_f(sub_f(code, grid.zero[v]), grid.scale[v]);
                store_f((float *)(out + input * WIDTH + v * LANES), weight);
            }
        }
    }
}

/* Of each 8 inputs 4 words as int16, 2 as bytes. */
INLINE void unpack_codes(int precision, int bits, const kern_panel *p, int64_t tile,
                         uint32_t *out) {
    const uint8_t *line = p->w->codes + (tile * p->w->k + p->start) * TILE * bits / 8;
    const int words = precision == FAST ? 2 : 4;
    for (int64_t k = p->start; k < p->end; k += 8, out += words * WIDTH, line += LINE * bits / 4) {
        EACH(b, bits / 4) prefetch(line + b * LINE + NEXT_PANEL(p->w));
        EACH(v, VECTORS) EACH(s, words) {
            vi raw = load(PART(bits == 8 ? line + s % 2 * LINE : line, v));
            vi codes = precision == FAST ? (s ? high(raw) : low(raw))
                       : bits == 8       ? byte_pairs(raw, s / 2)
                                         : pairs(raw, s);
            store(out + s * WIDTH + v * LANES, codes);
        }
    }
}

static void unpack(int precision, const kern_panel *p) {
    for (int t = 0; t < p->tiles; t++) {
        uint32_t *out = p->words + t * TILE;
        if (precision == EXACT && p->w->bits == 8)
            unpack_floats(8, p, p->tile + t, out);
        else if (precision == EXACT)
            unpack_floats(4, p, p->tile + t, out);
        else if (precision == FAST)
            unpack_codes(FAST, 4, p, p->tile + t, out);
        else if (p->w->bits == 8)
            unpack_codes(HIGH, 8, p, p->tile + t, out);
        else
            unpack_codes(HIGH, 4, p, p->tile + t, out);
    }
}

INLINE void multiply_floats(int rows, const kern_panel *p, const kern_input *x, int64_t row,
                            float *totals) {
    const float *values = (const float *)x->words + row * p->w->k + p->start * rows;
    const float *panel = (const float *)p->words;
    vf sums[PANEL_ROWS][WIDE];
    EACH(r, rows) EACH(v, WIDE) sums[r][v] = load_f(totals + (r * WIDE + v) * LANES);
    for (int64_t k = p->start; k < p->end; k++, panel += WIDTH, values += rows) {
        vf weights[WIDE];
        EACH(v, WIDE) weights[v] = load_f(panel + v * LANES);
        EACH(r, rows) {
            vf input = value(values + r);
            EACH(v, WIDE) sums[r][v] = fma_f(weights[v], input, sums[r][v]);
        }
    }
    EACH(r, rows) EACH(v, WIDE) store_f(totals + (r * WIDE + v) * LANES, sums[r][v]);
}

/* parts += the exact dot products of one block of `words` words times the activations' scales. */
INLINE void add_block(int precision, int rows, int64_t words, const uint32_t *panel,
                      const uint32_t *x, const float *scales, vf parts[][WIDE]) {
    v8 sums[PANEL_ROWS_CODES][WIDE];
    EACH(r, rows) EACH(v, WIDE) sums[r][v] = zero_8();
    for (int64_t i = 0; i < words; i += 8)
        EACH(j, 8) {
            vi codes[WIDE];
            EACH(v, WIDE) codes[v] = load(panel + (i + j) * WIDTH + v * LANES);
            EACH(r, rows) {
                vi input = word(x + (i + j) * rows + r);
                EACH(v, WIDE) {
                    sums[r][v] = precision == FAST ? dot8(sums[r][v], codes[v], input)
                                                   : dot16(sums[r][v], codes[v], input);
                    PIN(sums[r][v]);
                }
            }
        }
    EACH(r, rows) EACH(v, WIDE) {
        vi dots = precision == FAST ? total8(sums[r][v]) : sums[r][v];
        parts[r][v] = fma_f(to_f(dots), value(scales + r), parts[r][v]);
    }
}

/* totals += the sums of group g, minus its zeros times the activations, times its scales. */
INLINE void close_group(int rows, const kern_panel *p, int64_t g, const float *sums,
                        vf parts[][WIDE], float *totals) {
    EACH(t, PANEL_TILES) {
        group_grid grid = load_grid(p->w, p->tile + (t < p->tiles ? t : 0), g);
        EACH(r, rows) EACH(i, VECTORS) {
            const int v = t * VECTORS + i;
            float *total = totals + (r * WIDE + v) * LANES;
            vf part = fma_f(sub_f(zero_f(), grid.zero[i]), value(sums + r), parts[r][v]);
            store_f(total, fma_f(part, grid.scale[i], load_f(total)));
            parts[r][v] = zero_f();
        }
    }
}

/* In the order of integer_tile: a group that goes on behind the panel leaves its sums in `open`. */
INLINE void multiply_codes(int precision, int rows, const kern_panel *p, const kern_input *x,
                           int64_t row, float *totals, float *open) {
    const kern_weight *w = p->w;
    const int64_t per_word = precision == FAST ? 4 : 2, words = x->block / per_word;
    const uint32_t *values = x->words + (row * w->k + p->start * rows) / per_word;
    const float *scales = x->scales + (row * w->k + p->start * rows) / x->block;
    const float *sums = x->sums + row * (w->k / w->group);
    const uint32_t *panel = p->words;
    const int resumes = p->start % w->group != 0;
    vf parts[PANEL_ROWS_CODES][WIDE];
    EACH(r, rows) EACH(v, WIDE)
        parts[r][v] = resumes ? load_f(open + (r * WIDE + v) * LANES) : zero_f();
    int64_t g = p->start / w->group, group_end = (g + 1) * w->group;
    for (int64_t k = p->start + x->block; k <= p->end; k += x->block) {
        add_block(precision, rows, words, panel, values, scales, parts);
        panel += words * WIDTH;
        values += words * rows;
        scales += rows;
        if (k < group_end) continue;
        close_group(rows, p, g, sums + g * rows, parts, totals);
        g++;
        group_end += w->group;
    }
    EACH(r, rows) EACH(v, WIDE) store_f(open + (r * WIDE + v) * LANES, parts[r][v]);
}

static void multiply_exact(int rows, const kern_panel *p, const kern_input *x, int64_t row,
                           float *totals) {
#define CALL(n) multiply_floats(n, p, x, row, totals)
    switch (rows) { CASES_PANEL(CALL) }
#undef CALL
}

static void multiply_high(int rows, const kern_panel *p, const kern_input *x, int64_t row,
                          float *totals, float *open) {
#define CALL(n) multiply_codes(HIGH, n, p, x, row, totals, open)
    switch (rows) { CASES_CODES(CALL) }
#undef CALL
}

static void multiply_fast(int rows, const kern_panel *p, const kern_input *x, int64_t row,
                          float *totals, float *open) {
#define CALL(n) multiply_codes(FAST, n, p, x, row, totals, open)
    switch (rows) { CASES_CODES(CALL) }
#undef CALL
}

static void multiply(int precision, int rows, const kern_panel *p, const kern_input *x,
                     int64_t row, float *totals, float *open) {
    if (precision == EXACT)
        multiply_exact(rows, p, x, row, totals);
    else if (precision == HIGH)
        multiply_high(rows, p, x, row, totals, open);
    else
        multiply_fast(rows, p, x, row, totals, open);
}
