/* 16-bit floats in plain C, for single values and for loops that the compiler vectorizes. */
#ifndef FLOATS_H
#define FLOATS_H

#include <stdint.h>
#include <string.h>

static inline float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

static inline float from_bfloat16(uint16_t h) { return float_of((uint32_t)h << 16); }

/* Subnormal halves are multiples of 2^-24: as fractions of 2^-14 they need no subnormal float. */
static inline float from_float16(uint16_t h) {
    const uint32_t most = h & 0x7fffu, shifted = most << 13;
    const float small = float_of(shifted + 0x38800000u) - 0x1p-14f;
    const uint32_t normal = shifted + 0x38000000u, infinite = shifted | 0x7f800000u;
    const uint32_t bits = most < 0x400u ? bits_of(small) : most < 0x7c00u ? normal : infinite;
    return float_of(bits | (uint32_t)(h & 0x8000u) << 16);
}

/* To the nearest, ties to even; so below. */
static inline uint16_t to_bfloat16(float x) {
    const uint32_t bits = bits_of(x);
    return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u
                                               : (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

/* Adding 0.5 to what is below 2^-14 leaves it as multiples of 2^-24. */
static inline uint16_t to_float16(float x) {
    const uint32_t bits = bits_of(x), most = bits & 0x7fffffffu;
    const uint32_t small = bits_of(float_of(most) + 0.5f) - 0x3f000000u;
    const uint32_t normal = (most - 0x38000000u + 0xfffu + (most >> 13 & 1)) >> 13;
    const uint32_t large = most > 0x7f800000u ? 0x7e00u : 0x7c00u;
    return (uint16_t)((bits >> 16 & 0x8000u) |
                      (most < 0x38800000u ? small : most < 0x47800000u ? normal : large));
}

#endif
