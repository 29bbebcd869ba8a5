/* GroupNorm of feature maps in channels_last order, fused with the addition before it and with SiLU and quantization
 * after it. The caller checks shapes. */
#include "activations.h"

/* Sum up the pixels [from, to) of one sample, channel by channel.
 * sums, squares [channels]: the sums of x - first and of (x - first)^2, where `first` is the sample's first pixel. */
static void channel_sums(const void *x, int64_t bfloat16, int64_t sample, int64_t size, int64_t channels, int64_t from,
                         int64_t to, float *sums, float *squares) {
    float part[CHUNK], first[CHUNK];
    for (int64_t start = 0; start < channels; start += CHUNK) {
        int64_t count = channels - start < CHUNK ? channels - start : CHUNK;
        float *sum = sums + start, *square = squares + start;
        memset(sum, 0, count * sizeof(float));
        memset(square, 0, count * sizeof(float));
        load(x, bfloat16, sample * size * channels + start, count, first);
        for (int64_t row = from; row < to; row++) {
            load(x, bfloat16, (sample * size + row) * channels + start, count, part);
            for (int64_t i = 0; i < count; i++) {
                float d = part[i] - first[i];
                sum[i] += d;
                square[i] += d * d;
            }
        }
    }
}

/* Find the scale and the offset of each channel of one sample, such that GroupNorm(x + added) = scale x + offset.
 * sums: of all slices of the sample, as channel_sums writes them. Means and variances of a group are merged channel by
 * channel (Chan et al. 1983). */
static void group_norm_lines(const void *x, int64_t bfloat16, int64_t sample, int64_t size, int64_t channels,
                             const float *added, int64_t groups, int64_t slices, const float *sums, const float *weight,
                             const float *bias, float eps, float *scale, float *offset) {
    int64_t width = channels / groups;
    for (int64_t group = 0; group < groups; group++) {
        double mean = 0, spread = 0;
        for (int64_t c = group * width; c < (group + 1) * width; c++) {
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

/* Quantize GroupNorm(x + added), or SiLU of it where `with_silu` is 1.
 * x: [samples, size, channels] with `size` pixels. added: float32 [samples, channels], or NULL for none.
 * out: uint8 like x, or two of them for wide codes.
 * Threads share the pixels of a sample as `slices` slices. Workspaces: sums has samples * slices * 2 * channels floats,
 * lines has samples * 2 * channels. */
void group_norm(const void *x, int64_t bfloat16, int64_t samples, int64_t size, int64_t channels, const float *added,
                int64_t groups, const float *weight, const float *bias, float eps, int64_t with_silu,
                const QuantParams *params, int64_t slices, float *sums, float *lines, uint8_t *out) {
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < samples * slices; i++) {
            int64_t slice = i % slices;
            float *own = sums + i * 2 * channels;
            channel_sums(x, bfloat16, i / slices, size, channels, size * slice / slices, size * (slice + 1) / slices,
                         own, own + channels);
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < samples; i++)
            group_norm_lines(x, bfloat16, i, size, channels, added, groups, slices, sums + i * slices * 2 * channels,
                             weight, bias, eps, lines + i * 2 * channels, lines + (i * 2 + 1) * channels);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < samples * size; row++) {
            const float *scale = lines + row / size * 2 * channels, *offset = scale + channels;
            float part[CHUNK];
            for (int64_t start = 0; start < channels; start += CHUNK) {
                int64_t count = channels - start < CHUNK ? channels - start : CHUNK;
                load(x, bfloat16, row * channels + start, count, part);
                for (int64_t i = 0; i < count; i++) part[i] = part[i] * scale[start + i] + offset[start + i];
                if (with_silu)
                    for (int64_t i = 0; i < count; i++) part[i] = silu(part[i]);
                quantize_row(part, count, *params, samples * size * channels, out + row * channels + start);
            }
        }
    }
}
