/* AVX-512 (F, BW, DQ, VL) with VNNI: a line is one register. */
#include "kern.h"
#include "quantize.h"
#include "search.h"
#include "solve.h"

#include <immintrin.h>

#define LANES 16
#define LOOKUP
#define MOST_SUMS 16
#define TILE_ROWS_FAST 8
#define TILE_ROWS_EXACT 8
#define PANEL_ROWS 12
#define PANEL_ROWS_CODES 6
#define PANEL_TILES 2
#define CASES_CODES(call) CASES4(call) CASE(5, call) CASE(6, call)
#define CASES_FAST CASES8
#define CASES_EXACT CASES8
#define CASES_PANEL(call) CASES8(call) CASE(9, call) CASE(10, call) CASE(11, call) CASE(12, call)
#define OP static inline __attribute__((always_inline))
#define PIN(x) __asm__("" : "+v"(x))

typedef __m512i vi, v8;
typedef __m512 vf;

OP void prefetch(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T0); }
OP vi load(const void *p) { return _mm512_loadu_si512(p); }
OP void store(void *p, vi a) { _mm512_storeu_si512(p, a); }
OP vf set1_f(float x) { return _mm512_set1_ps(x); }
OP vi zero_i(void) { return _mm512_setzero_si512(); }
OP vf zero_f(void) { return _mm512_setzero_ps(); }
OP v8 zero_8(void) { return _mm512_setzero_si512(); }
OP vi low(vi raw) { return _mm512_and_si512(raw, _mm512_set1_epi8(15)); }
OP vi high(vi raw) { return low(_mm512_srli_epi16(raw, 4)); }
OP vi pairs(vi raw, int s) {
    return _mm512_and_si512(_mm512_srli_epi16(raw, 4 * s), _mm512_set1_epi16(15));
}
OP vi byte_pairs(vi raw, int s) {
    return s ? _mm512_srli_epi16(raw, 8) : _mm512_and_si512(raw, _mm512_set1_epi16(255));
}
OP vi add_i(vi a, vi b) { return _mm512_add_epi32(a, b); }
OP vf to_f(vi a) { return _mm512_cvtepi32_ps(a); }
OP vf fma_f(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
OP vf add_f(vf a, vf b) { return _mm512_add_ps(a, b); }
OP vf mul_f(vf a, vf b) { return _mm512_mul_ps(a, b); }
OP vf sub_f(vf a, vf b) { return _mm512_sub_ps(a, b); }
OP vf load_f(const float *p) { return _mm512_loadu_ps(p); }
OP void store_f(float *p, vf a) { _mm512_storeu_ps(p, a); }
OP vf load_half(const uint16_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
OP vi load_bytes(const uint8_t *p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
}
OP vi field(vi raw, int down, int mask) {
    return _mm512_and_si512(_mm512_srli_epi32(raw, down), _mm512_set1_epi32(mask));
}
OP vi down(vi a, int n) { return _mm512_srli_epi32(a, n); }
OP vf all_codes(void) {
    return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
OP vf choose_of_16(vi which, vf values) { return _mm512_permutexvar_ps(which, values); }
OP vf choose_of_32(vi which) {
    return _mm512_permutex2var_ps(all_codes(), which, sub_f(all_codes(), set1_f(16)));
}
OP vi sub_bytes(vi a, vi b) { return _mm512_sub_epi8(a, b); }
OP vi sub_i(vi a, vi b) { return _mm512_sub_epi32(a, b); }
OP vi repeat(vf zero, int ones) {
    return _mm512_mullo_epi32(_mm512_cvtps_epi32(zero), _mm512_set1_epi32(ones));
}
OP vi word(const uint32_t *p) { return _mm512_set1_epi32((int32_t)*p); }
OP vf value(const float *p) { return set1_f(*p); }
OP v8 dot8(v8 acc, vi w, vi a) { return _mm512_dpbusd_epi32(acc, w, a); }
OP vi total8(v8 acc) { return acc; }
OP vi dot16(vi acc, vi w, vi a) { return _mm512_dpwssd_epi32(acc, w, a); }

#include "tile.h"

const kern_isa kern_avx512 = KERNELS("avx512");
