/* Rows of float32 or bfloat16, and the elementary functions on them. All loops are plain C, written so that compilers
 * turn them into vector instructions. */
#ifndef DSDIFF_REST_H
#define DSDIFF_REST_H

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { CHUNK = 512 }; /* numbers worked on at a time: they stay in the first cache */

/* How a number becomes a code: clamp(round(x / delta) + zero_point, 0, high). */
typedef struct {
    float delta, zero_point, high;
} Range;

static inline float from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline uint32_t to_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* bfloat16, ties to even; NaN stays NaN. */
static inline uint16_t to_bfloat16(float x) {
    uint32_t bits = to_bits(x);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (uint16_t)rounded;
}

/* `count` numbers, from the place `at` of x on, as float32. */
static inline void load(const void *x, int64_t bfloat16, int64_t at, int64_t count, float *out) {
    if (bfloat16) {
        const uint16_t *from = (const uint16_t *)x + at;
        for (int64_t i = 0; i < count; i++) out[i] = from_bits((uint32_t)from[i] << 16);
    } else {
        memcpy(out, (const float *)x + at, count * sizeof(float));
    }
}

static inline void store(const float *x, int64_t bfloat16, int64_t at, int64_t count, void *out) {
    if (bfloat16) {
        uint16_t *to = (uint16_t *)out + at;
        for (int64_t i = 0; i < count; i++) to[i] = to_bfloat16(x[i]);
    } else {
        memcpy((float *)out + at, x, count * sizeof(float));
    }
}

/* A division, not a product with 1 / delta: the codes are those of UniformAffineQuantizer, bit for bit. */
static inline void quantize_row(const float *x, int64_t count, Range range, uint8_t *out) {
    for (int64_t i = 0; i < count; i++) {
        float code = rintf(x[i] / range.delta) + range.zero_point;
        code = code > 0 ? code : 0;
        code = code < range.high ? code : range.high;
        out[i] = (uint8_t)(int32_t)code;
    }
}

/* e^x within 2e-7, relative, on [-87, 88]; beyond, its values there. x = n ln 2 + r, |r| <= ln 2 / 2. */
static inline float exp_(float x) {
    x = x < 88.0f ? x : 88.0f;
    x = x > -87.0f ? x : -87.0f;
    float n = rintf(x * 1.44269504f);
    float r = x - n * 0.693145752f - n * 1.42860677e-6f;
    float p = 1.98412698e-4f;
    p = p * r + 1.38888889e-3f;
    p = p * r + 8.33333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    return p * from_bits((uint32_t)((int32_t)n + 127) << 23);
}

static inline float silu(float x) { return x / (1.0f + exp_(-x)); }

/* x (1 + erf(x / sqrt 2)) / 2, with erf within 2e-7 (Abramowitz and Stegun 7.1.26). */
static inline float gelu(float x) {
    float z = fabsf(x) * 0.707106781f;
    float t = 1.0f / (1.0f + 0.3275911f * z);
    float p = 1.061405429f;
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    float tail = 0.5f * p * t * exp_(-z * z); /* the normal distribution beyond |x| */
    return x * (x > 0 ? 1.0f - tail : tail);
}

#endif
