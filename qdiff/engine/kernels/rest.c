/* What stands between the integer products of a UNet, each as one pass over memory that ends in codes.
 *
 * Tensors are rows of channels: tokens [B, N, C], or pixels of a feature map in channels_last order. `bfloat16` says of
 * the floats whether they are that, or float32. Whoever calls checks shapes: nothing is checked here. */
#include "rest.h"

/* Codes of rows of `width` numbers that lie `stride` apart, by each of `outputs` ranges: uint8 [outputs, rows, width]. */
void quantize(const void *x, int64_t bfloat16, int64_t rows, int64_t width, int64_t stride, const Range *ranges,
              int64_t outputs, uint8_t *out) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        float part[CHUNK];
        for (int64_t at = 0; at < width; at += CHUNK) {
            int64_t count = width - at < CHUNK ? width - at : CHUNK;
            load(x, bfloat16, row * stride + at, count, part);
            for (int64_t k = 0; k < outputs; k++)
                quantize_row(part, count, ranges[k], out + (k * rows + row) * width + at);
        }
    }
}

/* LayerNorm of rows, as floats of x's kind. */
void layer_norm(const void *x, int64_t bfloat16, int64_t rows, int64_t width, const float *weight, const float *bias,
                float eps, void *out) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        float part[CHUNK];
        float sum = 0, squares = 0, first;
        load(x, bfloat16, row * width, 1, &first); /* sums of differences from it lose less */
        for (int64_t at = 0; at < width; at += CHUNK) {
            int64_t count = width - at < CHUNK ? width - at : CHUNK;
            load(x, bfloat16, row * width + at, count, part);
#pragma omp simd reduction(+ : sum, squares)
            for (int64_t i = 0; i < count; i++) {
                float d = part[i] - first;
                sum += d;
                squares += d * d;
            }
        }
        float shift = sum / width, variance = squares / width - shift * shift;
        float scale = 1.0f / sqrtf((variance > 0 ? variance : 0) + eps), mean = first + shift;
        for (int64_t at = 0; at < width; at += CHUNK) {
            int64_t count = width - at < CHUNK ? width - at : CHUNK;
            load(x, bfloat16, row * width + at, count, part);
            for (int64_t i = 0; i < count; i++) part[i] = (part[i] - mean) * scale * weight[at + i] + bias[at + i];
            store(part, bfloat16, row * width + at, count, out);
        }
    }
}

/* The sums of a slice of rows [from, to) of one sample: of differences from the sample's first row, and of squares. */
static void channel_sums(const void *x, int64_t bfloat16, int64_t sample, int64_t size, int64_t channels, int64_t from,
                         int64_t to, float *sums, float *squares) {
    float part[CHUNK], first[CHUNK];
    for (int64_t at = 0; at < channels; at += CHUNK) {
        int64_t count = channels - at < CHUNK ? channels - at : CHUNK;
        float *sum = sums + at, *square = squares + at;
        memset(sum, 0, count * sizeof(float));
        memset(square, 0, count * sizeof(float));
        load(x, bfloat16, sample * size * channels + at, count, first);
        for (int64_t row = from; row < to; row++) {
            load(x, bfloat16, (sample * size + row) * channels + at, count, part);
            for (int64_t i = 0; i < count; i++) {
                float d = part[i] - first[i];
                sum[i] += d;
                square[i] += d * d;
            }
        }
    }
}

/* For each channel of a sample, y = scale x + offset is its GroupNorm; x may lack a constant, `added`, a channel. */
static void group_norm_lines(const void *x, int64_t bfloat16, int64_t sample, int64_t size, int64_t channels,
                             const float *added, int64_t groups, int64_t slices, const float *sums, const float *weight,
                             const float *bias, float eps, float *scale, float *offset) {
    int64_t width = channels / groups;
    for (int64_t group = 0; group < groups; group++) {
        double mean = 0, spread = 0;
        for (int64_t c = group * width; c < (group + 1) * width; c++) { /* channel by channel, then their means */
            double sum = 0, square = 0;
            float first, more = added ? added[sample * channels + c] : 0;
            for (int64_t k = 0; k < slices; k++) {
                sum += sums[2 * k * channels + c];
                square += sums[(2 * k + 1) * channels + c];
            }
            load(x, bfloat16, sample * size * channels + c, 1, &first);
            double own = sum / size + first + more, steps = c - group * width + 1;
            spread += square / size - sum / size * (sum / size) + (own - mean) * (own - mean) * (steps - 1) / steps;
            mean += (own - mean) / steps;
            offset[c] = more;
        }
        double deviation = sqrt((spread > 0 ? spread : 0) / width + eps);
        for (int64_t c = group * width; c < (group + 1) * width; c++) {
            scale[c] = (float)(weight[c] / deviation);
            offset[c] = (float)(bias[c] + (offset[c] - mean) * weight[c] / deviation);
        }
    }
}

/* Codes of GroupNorm(x + added), through SiLU where `with_silu`. x [samples, size, channels]; added [samples, channels],
 * float32, or NULL. sums: room for samples * slices * 2 * channels floats; lines: for samples * 2 * channels. */
void group_norm(const void *x, int64_t bfloat16, int64_t samples, int64_t size, int64_t channels, const float *added,
                int64_t groups, const float *weight, const float *bias, float eps, int64_t with_silu, const Range *range,
                int64_t slices, float *sums, float *lines, uint8_t *out) {
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < samples * slices; i++) {
            int64_t slice = i % slices;
            float *own = sums + i * 2 * channels;
            channel_sums(x, bfloat16, i / slices, size, channels, size * slice / slices, size * (slice + 1) / slices, own,
                         own + channels);
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < samples; i++)
            group_norm_lines(x, bfloat16, i, size, channels, added, groups, slices, sums + i * slices * 2 * channels,
                             weight, bias, eps, lines + i * 2 * channels, lines + (i * 2 + 1) * channels);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < samples * size; row++) {
            const float *scale = lines + row / size * 2 * channels, *offset = scale + channels;
            float part[CHUNK];
            for (int64_t at = 0; at < channels; at += CHUNK) {
                int64_t count = channels - at < CHUNK ? channels - at : CHUNK;
                load(x, bfloat16, row * channels + at, count, part);
                for (int64_t i = 0; i < count; i++) part[i] = part[i] * scale[at + i] + offset[at + i];
                if (with_silu)
                    for (int64_t i = 0; i < count; i++) part[i] = silu(part[i]);
                quantize_row(part, count, *range, out + row * channels + at);
            }
        }
    }
}

/* Codes of value * gelu(gate), of rows [value | gate] of 2 * width numbers. */
void geglu(const void *x, int64_t bfloat16, int64_t rows, int64_t width, const Range *range, uint8_t *out) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        float value[CHUNK], gate[CHUNK];
        for (int64_t at = 0; at < width; at += CHUNK) {
            int64_t count = width - at < CHUNK ? width - at : CHUNK;
            load(x, bfloat16, row * 2 * width + at, count, value);
            load(x, bfloat16, (row * 2 + 1) * width + at, count, gate);
            for (int64_t i = 0; i < count; i++) value[i] *= gelu(gate[i]);
            quantize_row(value, count, *range, out + row * width + at);
        }
    }
}
