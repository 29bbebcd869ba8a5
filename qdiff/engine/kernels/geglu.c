/* The gated activation of a feed-forward layer, fused with the quantization after it. The caller checks shapes. */
#include "activations.h"

/* Quantize value * gelu(gate). A row of x holds `width` values, then `width` gates. out: uint8 [rows, width], or
 * [2, rows, width] for wide codes. */
void geglu(const void *x, int64_t bfloat16, int64_t rows, int64_t width, const QuantParams *params, uint8_t *out) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        float value[CHUNK], gate[CHUNK];
        for (int64_t start = 0; start < width; start += CHUNK) {
            int64_t count = width - start < CHUNK ? width - start : CHUNK;
            load(x, bfloat16, row * 2 * width + start, count, value);
            load(x, bfloat16, (row * 2 + 1) * width + start, count, gate);
            for (int64_t i = 0; i < count; i++) value[i] *= gelu(gate[i]);
            quantize_row(value, count, *params, rows * width, out + row * width + start);
        }
    }
}
