/* Ranges that are taken from the numbers which are quantized: of each row, or of each sample. */
#ifndef DSDIFF_RANGES_H
#define DSDIFF_RANGES_H

#include "rows.h"

/* How they are taken. high: 2^bits - 1. symmetric: 1 if the middle of the codes stands for 0. */
typedef struct {
    float high;
    int64_t symmetric;
} Dynamic;

/* A range: x stands for (code - zero_point) * delta. */
typedef struct {
    float delta, zero_point;
} Range;

/* Return the range of numbers in [low, high], extended to 0. All steps are those of `dynamic_range` in
 * qdiff/quantizers.py, and so are the results, bit for bit. */
static inline Range range_of(float low, float high, Dynamic dynamic) {
    low = low < 0 ? low : 0;
    high = high > 0 ? high : 0;
    float reach = -low > high ? -low : high, half = (dynamic.high - 1) / 2;
    float delta = dynamic.symmetric ? reach / half : (high - low) / dynamic.high;
    delta = delta > 1e-8f ? delta : 1e-8f;
    return (Range){delta, dynamic.symmetric ? half + 1 : rintf(-low / delta)};
}

/* Return the quantizer of a range. */
static inline QuantParams params_of(Range range, Dynamic dynamic) {
    return (QuantParams){range.delta, range.zero_point, dynamic.high};
}

/* Extend [*low, *high] to `count` numbers. */
static inline void extend(const float *x, int64_t count, float *low, float *high) {
    float least = *low, most = *high;
#pragma omp simd reduction(min : least) reduction(max : most)
    for (int64_t i = 0; i < count; i++) {
        least = x[i] < least ? x[i] : least;
        most = x[i] > most ? x[i] : most;
    }
    *low = least;
    *high = most;
}

/* A feature map of codes in channels_last order, with a border of pixels that stand for 0. */
typedef struct {
    int64_t samples, height, width, channels, above, beside;
} Padded;

/* Return the bytes of a plane of a padded map. */
static inline int64_t padded_plane(Padded map) {
    return map.samples * (map.height + 2 * map.above) * (map.width + 2 * map.beside) * map.channels;
}

/* Return where a pixel begins in it. row: the number of the pixel in the map without its border. */
static inline int64_t padded_place(Padded map, int64_t row) {
    int64_t line = row / map.width, sample = line / map.height;
    line += (2 * sample + 1) * map.above;
    return (line * (map.width + 2 * map.beside) + map.beside + row % map.width) * map.channels;
}

/* Fill the border of one line of the padded map, 0 <= line < samples * (height + 2 above), with a code. */
static inline void fill_border(Padded map, int64_t line, uint8_t code, uint8_t *out) {
    int64_t of_sample = line % (map.height + 2 * map.above), whole = (map.width + 2 * map.beside) * map.channels;
    uint8_t *start = out + line * whole;
    if (of_sample < map.above || of_sample >= map.above + map.height) {
        memset(start, code, whole);
    } else {
        memset(start, code, map.beside * map.channels);
        memset(start + whole - map.beside * map.channels, code, map.beside * map.channels);
    }
}

/* Fill the border of one line in all planes of a map. */
static inline void fill_borders(Padded map, int64_t line, QuantParams params, uint8_t *out) {
    int32_t zero = (int32_t)params.zero_point;
    fill_border(map, line, (uint8_t)zero, out);
    if (is_wide(params)) fill_border(map, line, (uint8_t)(zero >> 8), out + padded_plane(map));
}

#endif
