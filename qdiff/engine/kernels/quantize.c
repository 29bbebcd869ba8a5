/* Quantization of rows by one or several quantizers. The caller checks shapes. */
#include "rows.h"

/* Quantize rows of `width` numbers by each of `outputs` quantizers. Rows start `stride` numbers apart.
 * x: bfloat16 numbers if `bfloat16` is 1, else float32. out: uint8 [planes, rows, width], with one plane for each
 * quantizer and two for a wide one. */
void quantize(const void *x, int64_t bfloat16, int64_t rows, int64_t width, int64_t stride, const QuantParams *params,
              int64_t outputs, uint8_t *out) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        float part[CHUNK];
        for (int64_t start = 0; start < width; start += CHUNK) {
            int64_t count = width - start < CHUNK ? width - start : CHUNK;
            load(x, bfloat16, row * stride + start, count, part);
            uint8_t *to = out + row * width + start;
            for (int64_t k = 0; k < outputs; k++) {
                quantize_row(part, count, params[k], rows * width, to);
                to += (is_wide(params[k]) ? 2 : 1) * rows * width;
            }
        }
    }
}
