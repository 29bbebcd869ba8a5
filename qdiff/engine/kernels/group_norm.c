/* GroupNorm of feature maps in channels_last order, fused with the addition before it and with SiLU and quantization
 * after it. The caller checks shapes. */
#include "activations.h"
#include "ranges.h"

/* Sum up the pixels [from, to) of one sample, channel by channel.
 * sums, squares [channels]: the sums of x - first and of (x - first)^2, where `first` is the sample's first pixel.
 * least, most [channels]: the extremes of x; NULL to leave them out. */
static void channel_sums(const void *x, int64_t bfloat16, int64_t sample, int64_t size, int64_t channels, int64_t from,
                         int64_t to, float *sums, float *squares, float *least, float *most) {
    float part[CHUNK], first[CHUNK];
    for (int64_t start = 0; start < channels; start += CHUNK) {
        int64_t count = channels - start < CHUNK ? channels - start : CHUNK;
        float *sum = sums + start, *square = squares + start;
        memset(sum, 0, count * sizeof(float));
        memset(square, 0, count * sizeof(float));
        load(x, bfloat16, sample * size * channels + start, count, first);
        for (int64_t i = start; least && i < start + count; i++) least[i] = INFINITY, most[i] = -INFINITY;
        for (int64_t row = from; row < to; row++) {
            load(x, bfloat16, (sample * size + row) * channels + start, count, part);
            for (int64_t i = 0; i < count; i++) {
                float d = part[i] - first[i];
                sum[i] += d;
                square[i] += d * d;
            }
            if (!least) continue;
            float *low = least + start, *high = most + start;
            for (int64_t i = 0; i < count; i++) {
                low[i] = part[i] < low[i] ? part[i] : low[i];
                high[i] = part[i] > high[i] ? part[i] : high[i];
            }
        }
    }
}

/* Find the scale and the offset of each channel of one sample, such that GroupNorm(gain x + added) = scale x + offset.
 * sums: of all slices of the sample, as channel_sums writes them. Means and variances of a group are merged channel by
 * channel (Chan et al. 1983). */
static void group_norm_lines(const void *x, int64_t bfloat16, int64_t sample, int64_t size, int64_t channels,
                             double gain, const float *added, int64_t groups, int64_t slices, const float *sums,
                             const float *weight, const float *bias, float eps, float *scale, float *offset) {
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
            double shift = sum / size, variance = square / size - shift * shift;
            double own = gain * (shift + first) + more, away = own - mean, count = c - group * width + 1;
            spread += gain * gain * variance + away * away * (count - 1) / count;
            mean += away / count;
            offset[c] = more;
        }
        double deviation = sqrt((spread > 0 ? spread : 0) / width + eps);
        for (int64_t c = group * width; c < (group + 1) * width; c++) {
            scale[c] = (float)(weight[c] * gain / deviation);
            offset[c] = (float)(bias[c] + (offset[c] - mean) * weight[c] / deviation);
        }
    }
}

/* Quantize scale x + offset of one pixel, or SiLU of it. scale: [2, channels], the offset behind it. */
static inline void normed_row(const void *x, int64_t bfloat16, int64_t row, int64_t channels, const float *scale,
                              int64_t with_silu, QuantParams params, int64_t plane, uint8_t *out) {
    const float *offset = scale + channels;
    float part[CHUNK];
    for (int64_t start = 0; start < channels; start += CHUNK) {
        int64_t count = channels - start < CHUNK ? channels - start : CHUNK;
        load(x, bfloat16, row * channels + start, count, part);
        for (int64_t i = 0; i < count; i++) part[i] = part[i] * scale[start + i] + offset[start + i];
        if (with_silu)
            for (int64_t i = 0; i < count; i++) part[i] = silu(part[i]);
        quantize_row(part, count, params, plane, out + start);
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
                         own, own + channels, NULL, NULL);
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < samples; i++)
            group_norm_lines(x, bfloat16, i, size, channels, 1, added, groups, slices, sums + i * slices * 2 * channels,
                             weight, bias, eps, lines + i * 2 * channels, lines + (i * 2 + 1) * channels);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < samples * size; row++) {
            normed_row(x, bfloat16, row, channels, lines + row / size * 2 * channels, with_silu, *params,
                       samples * size * channels, out + row * channels);
        }
    }
}

/* Return the range of one sample after GroupNorm, and SiLU where `with_silu` is 1. extremes: of all slices of the
 * sample, [slices, 2, channels]. SiLU falls up to x = -1.2784645 and rises from there. So its extremes are at the ends,
 * or its least value is one, which no number may quite reach. */
static Range range_of_sample(const float *extremes, int64_t slices, int64_t channels, const float *scale,
                             const float *offset, int64_t with_silu, Dynamic dynamic) {
    float least = INFINITY, most = -INFINITY;
    for (int64_t slice = 0; slice < 2 * slices; slice++) {
        for (int64_t c = 0; c < channels; c++) {
            float y = extremes[slice * channels + c] * scale[c] + offset[c];
            least = y < least ? y : least;
            most = y > most ? y : most;
        }
    }
    if (with_silu) {
        float ends[2] = {silu(least), silu(most)};
        int turns = least < -1.2784645f && most > -1.2784645f;
        least = turns ? -0.27846455f : (ends[0] < ends[1] ? ends[0] : ends[1]);
        most = ends[0] > ends[1] ? ends[0] : ends[1];
    }
    return range_of(least, most, dynamic);
}

/* Quantize GroupNorm(gain x + added), or SiLU of it, each sample by its own range, which costs no further pass over x.
 * Arguments are those of group_norm, with these differences: a sample has height * width pixels; out is a padded map,
 * or two of them; gains: [samples], or NULL for 1; ranges: [samples]; sums: has twice as many floats. */
void group_norm_samples(const void *x, int64_t bfloat16, int64_t samples, int64_t height, int64_t width,
                        int64_t channels, const float *gains, const float *added, int64_t groups, const float *weight,
                        const float *bias, float eps, int64_t with_silu, float high, int64_t symmetric, int64_t above,
                        int64_t beside, int64_t slices, float *sums, float *lines, Range *ranges, uint8_t *out) {
    int64_t size = height * width;
    float *extremes = sums + samples * slices * 2 * channels;
    Dynamic dynamic = {high, symmetric};
    Padded map = {samples, height, width, channels, above, beside};
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < samples * slices; i++) {
            int64_t slice = i % slices, at = i * 2 * channels;
            channel_sums(x, bfloat16, i / slices, size, channels, size * slice / slices, size * (slice + 1) / slices,
                         sums + at, sums + at + channels, extremes + at, extremes + at + channels);
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < samples; i++) {
            float *scale = lines + i * 2 * channels, *offset = scale + channels;
            int64_t at = i * slices * 2 * channels;
            group_norm_lines(x, bfloat16, i, size, channels, gains ? gains[i] : 1, added, groups, slices, sums + at,
                             weight, bias, eps, scale, offset);
            ranges[i] = range_of_sample(extremes + at, slices, channels, scale, offset, with_silu, dynamic);
        }
#pragma omp for schedule(static) nowait
        for (int64_t line = 0; line < samples * (height + 2 * above); line++)
            fill_borders(map, line, params_of(ranges[line / (height + 2 * above)], dynamic), out);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < samples * size; row++) {
            const float *scale = lines + row / size * 2 * channels;
            normed_row(x, bfloat16, row, channels, scale, with_silu, params_of(ranges[row / size], dynamic),
                       padded_plane(map), out + padded_place(map, row));
        }
    }
}
