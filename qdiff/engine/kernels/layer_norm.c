/* LayerNorm of rows. The caller checks shapes. */
#include "rows.h"

/* Normalize each row of x [rows, width], then scale and shift it by weight and bias [width]. out: of x's dtype.
 * Sums are of differences from the row's first number: they lose less where the mean is far from 0. */
void layer_norm(const void *x, int64_t bfloat16, int64_t rows, int64_t width, const float *weight, const float *bias,
                float eps, void *out) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        float part[CHUNK];
        float sum = 0, squares = 0, first;
        load(x, bfloat16, row * width, 1, &first);
        for (int64_t start = 0; start < width; start += CHUNK) {
            int64_t count = width - start < CHUNK ? width - start : CHUNK;
            load(x, bfloat16, row * width + start, count, part);
#pragma omp simd reduction(+ : sum, squares)
            for (int64_t i = 0; i < count; i++) {
                float d = part[i] - first;
                sum += d;
                squares += d * d;
            }
        }
        float shift = sum / width, variance = squares / width - shift * shift;
        float scale = 1.0f / sqrtf((variance > 0 ? variance : 0) + eps), mean = first + shift;
        for (int64_t start = 0; start < width; start += CHUNK) {
            int64_t count = width - start < CHUNK ? width - start : CHUNK;
            load(x, bfloat16, row * width + start, count, part);
            for (int64_t i = 0; i < count; i++)
                part[i] = (part[i] - mean) * scale * weight[start + i] + bias[start + i];
            store(part, bfloat16, row * width + start, count, out);
        }
    }
}
