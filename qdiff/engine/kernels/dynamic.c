/* Quantization by ranges that are taken from the numbers themselves, and what follows a product of such codes. The
 * caller checks shapes. */
#include "activations.h"
#include "ranges.h"

/* Quantize rows of `width` numbers, each by its own range. Rows start `stride` numbers apart.
 * ranges: [rows]. out: uint8 [rows, width], or two of them for wide codes. */
void quantize_tokens(const void *x, int64_t bfloat16, int64_t rows, int64_t width, int64_t stride, float high,
                     int64_t symmetric, Range *ranges, uint8_t *out) {
    Dynamic dynamic = {high, symmetric};
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        float part[CHUNK], least = 0, most = 0;
        for (int64_t start = 0; start < width; start += CHUNK) {
            int64_t count = width - start < CHUNK ? width - start : CHUNK;
            load(x, bfloat16, row * stride + start, count, part);
            extend(part, count, &least, &most);
        }
        ranges[row] = range_of(least, most, dynamic);
        QuantParams params = params_of(ranges[row], dynamic);
        for (int64_t start = 0; start < width; start += CHUNK) {
            int64_t count = width - start < CHUNK ? width - start : CHUNK;
            if (width > CHUNK) load(x, bfloat16, row * stride + start, count, part);
            quantize_row(part, count, params, rows * width, out + row * width + start);
        }
    }
}

/* Quantize samples of `height` x `width` pixels, each sample by its own range. Pixels start `stride` numbers apart.
 * extremes: a workspace of 2 * samples * height numbers. ranges: [samples]. out: uint8, a padded map, or two of them.
 */
void quantize_samples(const void *x, int64_t bfloat16, int64_t samples, int64_t height, int64_t width, int64_t channels,
                      int64_t stride, int64_t above, int64_t beside, float high, int64_t symmetric, float *extremes,
                      Range *ranges, uint8_t *out) {
    Dynamic dynamic = {high, symmetric};
    Padded map = {samples, height, width, channels, above, beside};
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t line = 0; line < samples * height; line++) {
            float part[CHUNK], least = 0, most = 0;
            for (int64_t row = line * width; row < (line + 1) * width; row++) {
                for (int64_t start = 0; start < channels; start += CHUNK) {
                    int64_t count = channels - start < CHUNK ? channels - start : CHUNK;
                    load(x, bfloat16, row * stride + start, count, part);
                    extend(part, count, &least, &most);
                }
            }
            extremes[2 * line] = least;
            extremes[2 * line + 1] = most;
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < samples; i++) {
            float least = 0, most = 0;
            extend(extremes + 2 * i * height, 2 * height, &least, &most);
            ranges[i] = range_of(least, most, dynamic);
        }
#pragma omp for schedule(static) nowait
        for (int64_t line = 0; line < samples * (height + 2 * above); line++)
            fill_borders(map, line, params_of(ranges[line / (height + 2 * above)], dynamic), out);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < samples * height * width; row++) {
            QuantParams params = params_of(ranges[row / (height * width)], dynamic);
            float part[CHUNK];
            for (int64_t start = 0; start < channels; start += CHUNK) {
                int64_t count = channels - start < CHUNK ? channels - start : CHUNK;
                load(x, bfloat16, row * stride + start, count, part);
                quantize_row(part, count, params, padded_plane(map), out + padded_place(map, row) + start);
            }
        }
    }
}

/* The numbers that turn a row of products of codes into the layer's outputs: (product - zero_point sum) delta + bias.
 * ranges: those of the rows' inputs, one for `each` rows. sums, bias: [width]. */
typedef struct {
    const Range *ranges;
    int64_t each;
    const float *sums, *bias;
} Rescaling;

/* Rescale `count` products of a row. start: the first output among them. */
static inline void rescale_part(Rescaling by, int64_t row, int64_t start, int64_t count, const float *products,
                                float *out) {
    Range range = by.ranges[row / by.each];
    const float *sums = by.sums + start, *bias = by.bias + start;
    for (int64_t i = 0; i < count; i++) out[i] = (products[i] - range.zero_point * sums[i]) * range.delta + bias[i];
}

/* Rescale products [rows, width], add `plus` to them unless it is NULL, and write numbers: float32, or bfloat16 if
 * `bfloat16` is 1, as `plus` has. */
void rescale(const float *products, int64_t rows, int64_t width, const Range *ranges, int64_t each, const float *sums,
             const float *bias, const void *plus, int64_t bfloat16, void *out) {
    Rescaling by = {ranges, each, sums, bias};
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        float part[CHUNK], more[CHUNK];
        for (int64_t start = 0; start < width; start += CHUNK) {
            int64_t count = width - start < CHUNK ? width - start : CHUNK, at = row * width + start;
            rescale_part(by, row, start, count, products + at, part);
            if (plus) {
                load(plus, bfloat16, at, count, more);
                for (int64_t i = 0; i < count; i++) part[i] += more[i];
            }
            store(part, bfloat16, at, count, out);
        }
    }
}

/* Rescale products [rows, width], and quantize them by one range of 8 bits at most. out: uint8 [rows, width]. */
void rescale_to_codes(const float *products, int64_t rows, int64_t width, const Range *ranges, int64_t each,
                      const float *sums, const float *bias, const QuantParams *params, uint8_t *out) {
    Rescaling by = {ranges, each, sums, bias};
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        float part[CHUNK];
        for (int64_t start = 0; start < width; start += CHUNK) {
            int64_t count = width - start < CHUNK ? width - start : CHUNK, at = row * width + start;
            rescale_part(by, row, start, count, products + at, part);
            quantize_row(part, count, *params, 0, out + at);
        }
    }
}

/* Quantize value * gelu(gate), each row by its own range. A row of x holds `width` values, then `width` gates. With
 * `in` they are products, float32, and are rescaled first; without it (NULL) they are numbers.
 * row_space: a workspace of `width` floats for each of `threads` threads. ranges: [rows].
 * out: uint8 [rows, width], or two of them for wide codes. */
void geglu_tokens(const void *x, int64_t bfloat16, int64_t rows, int64_t width, const Range *in, const float *sums,
                  const float *bias, float high, int64_t symmetric, int64_t threads, float *row_space, Range *ranges,
                  uint8_t *out) {
    Dynamic dynamic = {high, symmetric};
    Rescaling by = {in, 1, sums, bias};
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t thread = 0; thread < threads; thread++) {
        float *value = row_space + thread * width, gate[CHUNK];
        for (int64_t row = rows * thread / threads; row < rows * (thread + 1) / threads; row++) {
            float least = 0, most = 0;
            for (int64_t start = 0; start < width; start += CHUNK) {
                int64_t count = width - start < CHUNK ? width - start : CHUNK;
                float *part = value + start;
                int64_t at = row * 2 * width + start;
                if (in) {
                    rescale_part(by, row, start, count, (const float *)x + at, part);
                    rescale_part(by, row, width + start, count, (const float *)x + at + width, gate);
                } else {
                    load(x, bfloat16, at, count, part);
                    load(x, bfloat16, at + width, count, gate);
                }
                for (int64_t i = 0; i < count; i++) part[i] *= gelu(gate[i]);
                extend(part, count, &least, &most);
            }
            ranges[row] = range_of(least, most, dynamic);
            quantize_row(value, width, params_of(ranges[row], dynamic), rows * width, out + row * width);
        }
    }
}
