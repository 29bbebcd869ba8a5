/* Activation functions in float32, without branches, so that loops over them become vector instructions. */
#ifndef DSDIFF_ACTIVATIONS_H
#define DSDIFF_ACTIVATIONS_H

#include "rows.h"

/* Return e^x with a relative error below 2e-7. x is clamped to [-87, 88]. With x = n ln 2 + r and |r| <= ln 2 / 2, the
 * result is 2^n times a polynomial in r. */
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

/* Return x / (1 + e^-x). */
static inline float silu(float x) { return x / (1.0f + exp_(-x)); }

/* Return x (1 + erf(x / sqrt 2)) / 2. The error of erf is below 2e-7 (Abramowitz and Stegun, formula 7.1.26). */
static inline float gelu(float x) {
    float z = fabsf(x) * 0.707106781f;
    float t = 1.0f / (1.0f + 0.3275911f * z);
    float p = 1.061405429f;
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    float tail = 0.5f * p * t * exp_(-z * z); /* the probability that a normal variable exceeds |x| */
    return x * (x > 0 ? 1.0f - tail : tail);
}

#endif
