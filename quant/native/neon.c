/* NEON with the dot product extension (ARMv8.2). */
#include "kern.h"
#include "quantize.h"
#include "search.h"
#include "solve.h"

#include <arm_neon.h>

#define LANES 4
#define MOST_SUMS 16
#define TILE_ROWS_FAST 4
#define TILE_ROWS_EXACT 4
#define PANEL_ROWS 4
#define PANEL_ROWS_CODES 4
#define PANEL_TILES 1
#define CASES_CODES CASES4
#define CASES_FAST CASES4
#define CASES_EXACT CASES4
#define CASES_PANEL CASES4
#define OP static inline __attribute__((always_inline))
#define PIN(x) __asm__("" : "+w"(x))

typedef int32x4_t vi, v8;
typedef float32x4_t vf;

OP void prefetch(const void *p) { __builtin_prefetch(p); }
OP vi load(const void *p) { return vreinterpretq_s32_u8(vld1q_u8(p)); }
OP void store(void *p, vi a) { vst1q_s32(p, a); }
OP vf set1_f(float x) { return vdupq_n_f32(x); }
OP vi zero_i(void) { return vdupq_n_s32(0); }
OP vf zero_f(void) { return vdupq_n_f32(0); }
OP v8 zero_8(void) { return vdupq_n_s32(0); }
OP vi low(vi raw) {
    return vreinterpretq_s32_u8(vandq_u8(vreinterpretq_u8_s32(raw), vdupq_n_u8(15)));
}
OP vi high(vi raw) { return vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(raw), 4)); }
OP uint16x8_t shifted(vi raw, int by) {
    return vshlq_u16(vreinterpretq_u16_s32(raw), vdupq_n_s16(-by));
}
OP vi pairs(vi raw, int s) {
    return vreinterpretq_s32_u16(vandq_u16(shifted(raw, 4 * s), vdupq_n_u16(15)));
}
OP vi byte_pairs(vi raw, int s) {
    return vreinterpretq_s32_u16(vandq_u16(shifted(raw, 8 * s), vdupq_n_u16(255)));
}
OP vi add_i(vi a, vi b) { return vaddq_s32(a, b); }
OP vf to_f(vi a) { return vcvtq_f32_s32(a); }
OP vf fma_f(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
OP vf add_f(vf a, vf b) { return vaddq_f32(a, b); }
OP vf mul_f(vf a, vf b) { return vmulq_f32(a, b); }
OP vf sub_f(vf a, vf b) { return vsubq_f32(a, b); }
OP vf load_f(const float *p) { return vld1q_f32(p); }
OP void store_f(float *p, vf a) { vst1q_f32(p, a); }
OP vf load_half(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
OP vi load_bytes(const uint8_t *p) { return (vi){p[0], p[1], p[2], p[3]}; }
OP vi field(vi raw, int down, int mask) {
    uint32x4_t lane = vshlq_u32(vreinterpretq_u32_s32(raw), vdupq_n_s32(-down));
    return vreinterpretq_s32_u32(vandq_u32(lane, vdupq_n_u32((uint32_t)mask)));
}
OP vi up(vi a, int n) { return vshlq_s32(a, vdupq_n_s32(n)); }
OP vi sub_i(vi a, vi b) { return vsubq_s32(a, b); }
OP vi repeat(vf zero, int ones) { return vmulq_n_s32(vcvtq_s32_f32(zero), ones); }
OP vi word(const uint32_t *p) { return vdupq_n_s32((int32_t)*p); }
OP vf value(const float *p) { return set1_f(*p); }
OP v8 dot8(v8 acc, vi w, vi a) {
    return vdotq_s32(acc, vreinterpretq_s8_s32(w), vreinterpretq_s8_s32(a));
}
OP vi total8(v8 acc) { return acc; }
OP vi dot16(vi acc, vi w, vi a) {
    int16x8_t codes = vreinterpretq_s16_s32(w), values = vreinterpretq_s16_s32(a);
    vi first = vmull_s16(vget_low_s16(codes), vget_low_s16(values));
    return vaddq_s32(acc, vpaddq_s32(first, vmull_high_s16(codes, values)));
}

#include "tile.h"

const kern_isa kern_neon = KERNELS("neon");
