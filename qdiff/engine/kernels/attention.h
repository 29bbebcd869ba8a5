/* Attention on codes: what its implementations share. */
#ifndef DSDIFF_ATTENTION_H
#define DSDIFF_ATTENTION_H

#include "rows.h"

enum { MAX_WIDTH = 256 }; /* of a head; wider ones might have sums of bytes that float32 does not hold exactly */

/* The operands. Let c be codes, Z zero points and D steps.
 * q, out: codes [batch, queries, heads * width]; out twice for wide codes. k, v: codes [batch, keys, heads * width].
 * mask: [batch, keys], 0 for keys that no query sees; NULL for none.
 * bias: [batch, keys], what is added to the logits of a key, as a power of 2; NULL for nothing.
 * scale: D_q D_k / sqrt(width) / ln 2; exponentials are powers of 2.
 * softmax_delta, softmax_high: the quantizer of the softmax, whose zero point is 0.
 * params: the quantizer of the result, for multiples of D_v.
 * workspace: of attention_bytes(batch * heads, keys, width) bytes. */
typedef struct {
    const uint8_t *q, *k, *v, *mask;
    const float *bias;
    int64_t batch, heads, queries, keys, width;
    float scale, zero_of_q, zero_of_v, softmax_delta, softmax_high;
    QuantParams params;
    uint8_t *workspace, *out;
    float *floats; /* where results go that are not quantized here, in the place of out; else NULL */
} Attention;

/* The coefficients of a polynomial that is 2^x for x in [0, 1) with a relative error below 1e-4, highest power first.
 * It is below 2 at 1, so that no probability is above 1. */
static const float POWER_OF_2[4] = {0.07802291f, 0.22606949f, 0.69583272f, 0.99992526f};

/* Return the bytes of a plane of the result. */
static inline int64_t out_plane(const Attention *a) { return a->batch * a->queries * a->heads * a->width; }

/* Return the largest probability that the quantizer of the softmax lets through. */
static inline float largest_probability(const Attention *a) { return (a->softmax_high + 0.5f) * a->softmax_delta; }

/* Write `count` results of a query. at: the place of the first one. */
static inline void write_results(const Attention *a, const float *results, int64_t count, int64_t at) {
    if (a->floats)
        memcpy(a->floats + at, results, count * sizeof(float));
    else
        quantize_row(results, count, a->params, out_plane(a), a->out + at);
}

/* Matrix tiles, see attention_tiles.c. They take no mask, and of the quantizer of the softmax they know the end of its
 * range, not its step. */
int64_t has_tiles(void);
int64_t tiles_bytes(int64_t keys, int64_t width);
void attend_by_tiles(const Attention *operands);

#endif
