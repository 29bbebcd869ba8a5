/* Rows of floats: how they are read, written and quantized.
 *
 * Numbers in memory are float32 or bfloat16; all computation is in float32. Loops are plain C, written so that a
 * compiler turns them into vector instructions. */
#ifndef DSDIFF_ROWS_H
#define DSDIFF_ROWS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

/* Kernels work on this many numbers at a time, so that these stay in the first-level cache. */
enum { CHUNK = 512 };

/* Round n up to a multiple of `to`. */
static inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

/* code = clamp(round(x / delta) + zero_point, 0, high) */
typedef struct {
    float delta, zero_point, high;
} QuantParams;

/* Return the float whose bits these are. */
static inline float from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Return the bits of x. */
static inline uint32_t to_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* Round x to bfloat16, ties to even. NaN stays NaN. */
static inline uint16_t to_bfloat16(float x) {
    uint32_t bits = to_bits(x);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (uint16_t)rounded;
}

/* Read x[start .. start + count) as float32. */
static inline void load(const void *x, int64_t bfloat16, int64_t start, int64_t count, float *out) {
    if (bfloat16) {
        const uint16_t *from = (const uint16_t *)x + start;
        for (int64_t i = 0; i < count; i++) out[i] = from_bits((uint32_t)from[i] << 16);
    } else {
        memcpy(out, (const float *)x + start, count * sizeof(float));
    }
}

/* Write `count` numbers to out[start .. start + count). */
static inline void store(const float *x, int64_t bfloat16, int64_t start, int64_t count, void *out) {
    if (bfloat16) {
        uint16_t *to = (uint16_t *)out + start;
        for (int64_t i = 0; i < count; i++) to[i] = to_bfloat16(x[i]);
    } else {
        memcpy((float *)out + start, x, count * sizeof(float));
    }
}

/* Return the code of x. It divides, although a product with 1 / delta would be faster: the codes must be those of
 * UniformAffineQuantizer bit for bit. */
static inline int32_t code_of(float x, QuantParams params) {
    float code = rintf(x / params.delta) + params.zero_point;
    code = code > 0 ? code : 0;
    code = code < params.high ? code : params.high;
    return (int32_t)code;
}

/* Return 1 if codes take two bytes. */
static inline int is_wide(QuantParams params) { return params.high > 255; }

/* Quantize `count` numbers. The high bytes of wide codes are written `plane` bytes behind the low ones. */
static inline void quantize_row(const float *x, int64_t count, QuantParams params, int64_t plane, uint8_t *out) {
    if (is_wide(params)) {
        uint8_t *high = out + plane;
        for (int64_t i = 0; i < count; i++) {
            int32_t code = code_of(x[i], params);
            out[i] = (uint8_t)code;
            high[i] = (uint8_t)(code >> 8);
        }
    } else {
        for (int64_t i = 0; i < count; i++) out[i] = (uint8_t)code_of(x[i], params);
    }
}

#endif
