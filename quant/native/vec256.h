/* The vector operations of tile.h on 256 bits: AVX2, FMA and F16C; with VNNI its dot products. */
#include "kern.h"
#include "quantize.h"
#include "search.h"
#include "solve.h"

#include <immintrin.h>

#define LANES 8
#define TILE_ROWS_FAST 4
#define TILE_ROWS_EXACT 4
#define PANEL_ROWS 6
#define PANEL_ROWS_CODES 4
#define PANEL_TILES 1
#define CASES_CODES CASES4
#define CASES_FAST CASES4
#define CASES_EXACT CASES4
#define CASES_PANEL(call) CASES4(call) CASE(5, call) CASE(6, call)
#define OP static inline __attribute__((always_inline))
/* Without it gcc hoists the products of a whole block and spills every accumulator. */
#define PIN(x) __asm__("" : "+x"(x))

typedef __m256i vi, v8;
typedef __m256 vf;

OP void prefetch(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T0); }
OP vi load(const void *p) { return _mm256_loadu_si256((const vi *)p); }
OP void store(void *p, vi a) { _mm256_storeu_si256((vi *)p, a); }
OP vf set1_f(float x) { return _mm256_set1_ps(x); }
OP vi zero_i(void) { return _mm256_setzero_si256(); }
OP vf zero_f(void) { return _mm256_setzero_ps(); }
OP v8 zero_8(void) { return _mm256_setzero_si256(); }
OP vi low(vi raw) { return _mm256_and_si256(raw, _mm256_set1_epi8(15)); }
OP vi high(vi raw) { return low(_mm256_srli_epi16(raw, 4)); }
OP vi pairs(vi raw, int s) {
    return _mm256_and_si256(_mm256_srli_epi16(raw, 4 * s), _mm256_set1_epi16(15));
}
OP vi byte_pairs(vi raw, int s) {
    return s ? _mm256_srli_epi16(raw, 8) : _mm256_and_si256(raw, _mm256_set1_epi16(255));
}
OP vi add_i(vi a, vi b) { return _mm256_add_epi32(a, b); }
OP vf to_f(vi a) { return _mm256_cvtepi32_ps(a); }
OP vf fma_f(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
OP vf add_f(vf a, vf b) { return _mm256_add_ps(a, b); }
OP vf mul_f(vf a, vf b) { return _mm256_mul_ps(a, b); }
OP vf sub_f(vf a, vf b) { return _mm256_sub_ps(a, b); }
OP vf load_f(const float *p) { return _mm256_loadu_ps(p); }
OP void store_f(float *p, vf a) { _mm256_storeu_ps(p, a); }
OP vf load_half(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
OP vi load_bytes(const uint8_t *p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
}
OP vi field(vi raw, int down, int mask) {
    return _mm256_and_si256(_mm256_srli_epi32(raw, down), _mm256_set1_epi32(mask));
}
OP vi up(vi a, int n) { return _mm256_slli_epi32(a, n); }
OP vi sub_i(vi a, vi b) { return _mm256_sub_epi32(a, b); }
OP vi repeat(vf zero, int ones) {
    return _mm256_mullo_epi32(_mm256_cvtps_epi32(zero), _mm256_set1_epi32(ones));
}
OP vi word(const uint32_t *p) { return _mm256_set1_epi32((int32_t)*p); }
OP vf value(const float *p) { return set1_f(*p); }

#ifdef WITH_VNNI
#define MOST_SUMS 8
OP v8 dot8(v8 acc, vi w, vi a) { return _mm256_dpbusd_avx_epi32(acc, w, a); }
OP vi total8(v8 acc) { return acc; }
OP vi dot16(vi acc, vi w, vi a) { return _mm256_dpwssd_avx_epi32(acc, w, a); }
#else
#define MOST_SUMS 2 /* additions take one cycle */
/* A product pair is at most 2 * 15 * 127 = 3810, and a block adds eight: 30480 fits in 16 bits. */
OP v8 dot8(v8 acc, vi w, vi a) { return _mm256_add_epi16(acc, _mm256_maddubs_epi16(w, a)); }
OP vi total8(v8 acc) { return _mm256_madd_epi16(acc, _mm256_set1_epi16(1)); }
OP vi dot16(vi acc, vi w, vi a) { return _mm256_add_epi32(acc, _mm256_madd_epi16(w, a)); }
#endif

#include "tile.h"
