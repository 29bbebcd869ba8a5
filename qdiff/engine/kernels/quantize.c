/* Quantization of rows by one or several quantizers. The caller checks shapes. */
#include "rows.h"

/* Quantize rows of `width` numbers by each of `outputs` quantizers. Rows start `stride` numbers apart.
 * x: bfloat16 numbers if `bfloat16` is 1, else float32. out: uint8 [outputs, rows, width]. */
void quantize(const void *x, int64_t bfloat16, int64_t rows, int64_t width, int64_t stride, const QuantParams *params,
              int64_t outputs, uint8_t *out) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        float part[CHUNK];
        for (int64_t start = 0; start < width; start += CHUNK) {
            int64_t count = width - start < CHUNK ? width - start : CHUNK;
            load(x, bfloat16, row * stride + start, count, part);
            for (int64_t k = 0; k < outputs; k++)
                quantize_row(part, count, params[k], out + (k * rows + row) * width + start);
        }
    }
}
