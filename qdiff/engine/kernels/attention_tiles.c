/* Attention on codes by matrix tiles (Intel AMX). The matrix of scores is never in memory.
 *
 * With the names of attention.h, the score of a query i and a key j is
 *
 *     D_q D_k / sqrt(d) (sum_d c_q c_k - Z_q sum_d c_k)
 *
 * up to terms that are the same for all keys of a query: these drop out of the softmax. The first sum is a product of
 * byte tiles, exact in 32 bits. Probabilities are rounded to bfloat16 and multiplied by c_v - Z_v, which bfloat16 holds
 * exactly; these sums are float32. Keys are processed in parts of PART. A running maximum and a running sum combine the
 * parts (Milakov and Gimelshein 2018, online softmax). Where the range of the quantizer of the softmax ends below a
 * probability, a second pass clips. Its step is left out: bfloat16 is coarser than 16 bits. */
#include "attention.h"

#if defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512DQ__) && \
    defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    TILE = 16,         /* a tile has 16 rows of 16 numbers of 32 bits */
    ROWS = 2 * TILE,   /* queries processed at a time */
    PART = 256,        /* keys processed at a time */
    REQUEST = 0x1023,  /* arch_prctl's ARCH_REQ_XCOMP_PERM: ask the kernel for a feature */
    TILE_DATA = 18,    /* the feature: tile registers */
};

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} __attribute__((packed)) TileConfig;

/* Return 1 if this process may use tiles. Linux has to be asked once. */
int64_t has_tiles(void) {
    static int allowed = -1;
    if (allowed < 0) allowed = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    return allowed;
}

/* The workspace of one head: keys and values in tile layout, and the constant that each key adds to its scores.
 * Values are pairs of bfloat16. */
typedef struct {
    uint8_t *keys;
    uint32_t *values;
    float *added;
} Head;

/* Return the bytes of a Head. */
static int64_t head_bytes(int64_t keys, int64_t width) {
    return up(keys, 2 * TILE) * (up(width, 64) + 2 * up(width, 2 * TILE) + sizeof(float));
}

/* Return the Head whose arrays begin at `workspace`. */
static Head head_of(uint8_t *workspace, int64_t keys, int64_t width) {
    int64_t all = up(keys, 2 * TILE), deep = up(width, 64), wide = up(width, 2 * TILE);
    return (Head){workspace, (uint32_t *)(workspace + all * deep), (float *)(workspace + all * (deep + 2 * wide))};
}

/* Return the bytes of the workspace that `attend_by_tiles` needs for each head. */
int64_t tiles_bytes(int64_t keys, int64_t width) { return head_bytes(keys, width); }

/* Lay out the keys of a head for tiles: 16 keys side by side, four bytes of each in turn. added[key] is factor times
 * the sum of its codes, and its bias. Keys that pad the last tile get a probability of 0. */
static void pack_keys(const uint8_t *k, const float *bias, int64_t keys, int64_t width, int64_t stride, float factor,
                      uint8_t *packed, float *added) {
    int64_t all = up(keys, 2 * TILE), deep = up(width, 64);
    memset(packed, 0, all * deep);
    for (int64_t key = 0; key < all; key++) {
        int32_t sum = 0;
        uint8_t row[MAX_WIDTH] = {0}, *to = packed + key / TILE * TILE * deep + key % TILE * 4;
        if (key < keys) memcpy(row, k + key * stride, width);
        for (int64_t i = 0; i < deep; i++) sum += row[i];
        for (int64_t i = 0; i < deep / 4; i++) memcpy(to + i * 64, row + i * 4, 4);
        added[key] = key < keys ? factor * sum + (bias ? bias[key] : 0) : -1e30f;
    }
}

/* Lay out the values of a head for tiles: the bfloat16 numbers of two keys side by side, 16 such pairs in a row. */
static void pack_values(const uint8_t *v, int64_t keys, int64_t width, int64_t stride, float zero_point,
                        uint32_t *packed) {
    int64_t all = up(keys, 2 * TILE), wide = up(width, 2 * TILE);
    for (int64_t key = 0; key < all; key += 2) {
        float pair[2][MAX_WIDTH];
        memset(pair, 0, sizeof pair);
        for (int64_t k = 0; k < 2 && key + k < keys; k++)
            for (int64_t i = 0; i < width; i++) pair[k][i] = v[(key + k) * stride + i] - zero_point;
        for (int64_t at = 0; at < wide; at += TILE) {
            uint32_t *to = packed + key / 32 * TILE * wide + at * TILE + key % 32 / 2 * TILE;
            for (int64_t i = 0; i < TILE; i++) /* whole numbers of 9 bits: truncation to bfloat16 is exact */
                to[i] = to_bits(pair[0][at + i]) >> 16 | (to_bits(pair[1][at + i]) & 0xffff0000u);
        }
    }
}

/* Multiply q [ROWS][deep] with `count` keys, a multiple of 32, into scores [ROWS][PART]. Four tiles of sums at a time
 * hide each other's latency. */
static void multiply_scores(const uint8_t *q, const uint8_t *packed_k, int64_t count, int64_t deep, int32_t *scores) {
    for (int64_t key = 0; key < count; key += 2 * TILE) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t at = 0; at < deep; at += 64) {
            _tile_loadd(4, q + at, deep);
            _tile_loadd(5, q + TILE * deep + at, deep);
            _tile_loadd(6, packed_k + key * deep + at * TILE, 64);
            _tile_loadd(7, packed_k + (key + TILE) * deep + at * TILE, 64);
            _tile_dpbuud(0, 4, 6);
            _tile_dpbuud(1, 4, 7);
            _tile_dpbuud(2, 5, 6);
            _tile_dpbuud(3, 5, 7);
        }
        _tile_stored(0, scores + key, PART * sizeof(int32_t));
        _tile_stored(1, scores + key + TILE, PART * sizeof(int32_t));
        _tile_stored(2, scores + TILE * PART + key, PART * sizeof(int32_t));
        _tile_stored(3, scores + TILE * PART + key + TILE, PART * sizeof(int32_t));
    }
}

/* Return 2^x for x <= 0: 2^floor(x) times a polynomial in x - floor(x). */
static inline __m512 power_of_2(__m512 x) {
    __m512 rest = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF), p = _mm512_set1_ps(POWER_OF_2[0]);
    for (int i = 1; i < 4; i++) p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(POWER_OF_2[i]));
    return _mm512_scalef_ps(p, x);
}

/* Return 16 logits: scores times the scale, plus the constants of their keys. */
static inline __m512 logits(const int32_t *scores, const float *added, __m512 scale) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(scores)), scale, _mm512_loadu_ps(added));
}

/* Turn one row of `count` scores, a multiple of 32, into probabilities that are not normalised yet, of at most `most`.
 * Update the row's running maximum and total. Return the factor by which the results of earlier parts must be
 * multiplied. */
static float exponentials(const int32_t *scores, const float *added, int64_t count, float scale, float most,
                          float *highest, float *total, uint16_t *out) {
    __m512 scales = _mm512_set1_ps(scale), mosts = _mm512_set1_ps(most), top = _mm512_set1_ps(*highest);
    __m512 sums = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; i += TILE) top = _mm512_max_ps(top, logits(scores + i, added + i, scales));
    float before = *highest;
    *highest = _mm512_reduce_max_ps(top);
    top = _mm512_set1_ps(*highest);
    for (int64_t i = 0; i < count; i += 2 * TILE) {
        __m512 first = power_of_2(_mm512_sub_ps(logits(scores + i, added + i, scales), top));
        __m512 second = power_of_2(_mm512_sub_ps(logits(scores + i + TILE, added + i + TILE, scales), top));
        first = _mm512_min_ps(first, mosts), second = _mm512_min_ps(second, mosts);
        sums = _mm512_add_ps(sums, _mm512_add_ps(first, second));
        _mm512_store_si512(out + i, (__m512i)_mm512_cvtne2ps_pbh(second, first));
    }
    float factor = exp2f(before - *highest);
    *total = *total * factor + _mm512_reduce_add_ps(sums);
    return factor;
}

/* Add probabilities [ROWS][PART] times values to output [ROWS][wide]. `count` keys and `wide` are multiples of 32. */
static void add_values(const uint16_t *probabilities, const uint32_t *packed_v, int64_t count, int64_t wide,
                       float *output) {
    int64_t bytes = wide * sizeof(float);
    for (int64_t at = 0; at < wide; at += 2 * TILE) {
        _tile_loadd(0, output + at, bytes);
        _tile_loadd(1, output + at + TILE, bytes);
        _tile_loadd(2, output + TILE * wide + at, bytes);
        _tile_loadd(3, output + TILE * wide + at + TILE, bytes);
        for (int64_t key = 0; key < count; key += 2 * TILE) {
            _tile_loadd(4, probabilities + key, PART * sizeof(uint16_t));
            _tile_loadd(5, probabilities + TILE * PART + key, PART * sizeof(uint16_t));
            _tile_loadd(6, packed_v + (key / 2 * wide + at * TILE), 64);
            _tile_loadd(7, packed_v + (key / 2 * wide + (at + TILE) * TILE), 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, output + at, bytes);
        _tile_stored(1, output + at + TILE, bytes);
        _tile_stored(2, output + TILE * wide + at, bytes);
        _tile_stored(3, output + TILE * wide + at + TILE, bytes);
    }
}

/* The sums of ROWS queries. highest: logit. most: what probabilities, in units of the highest one, must not exceed.
 * total: their sum. output: [ROWS][wide], probabilities times values. */
typedef struct {
    float highest[ROWS], most[ROWS], total[ROWS];
    _Alignas(64) float output[ROWS * MAX_WIDTH];
} Block;

/* Sum up the values of all keys. queries: [ROWS][deep]. */
static void sum_up(const uint8_t *queries, int64_t all, int64_t deep, int64_t wide, float scale, Head head,
                   Block *block) {
    _Alignas(64) int32_t scores[ROWS * PART];
    _Alignas(64) uint16_t probabilities[ROWS * PART];
    memset(block->output, 0, ROWS * wide * sizeof(float));
    memset(block->total, 0, sizeof block->total);
    for (int64_t key = 0; key < all; key += PART) {
        int64_t count = all - key < PART ? all - key : PART;
        __asm__ volatile("" ::: "memory");
        multiply_scores(queries, head.keys + key * deep, count, deep, scores);
        for (int64_t row = 0; row < ROWS; row++) {
            float factor = exponentials(scores + row * PART, head.added + key, count, scale, block->most[row],
                                        block->highest + row, block->total + row, probabilities + row * PART);
            for (int64_t i = 0; i < wide; i++) block->output[row * wide + i] *= factor;
        }
        __asm__ volatile("" ::: "memory");
        add_values(probabilities, head.values + key / 2 * wide, count, wide, block->output);
    }
}

/* Compute attention for up to ROWS queries of a head, the first of them at place `at`, and quantize the results. */
static void attend(const Attention *a, int64_t at, int64_t rows, Head head) {
    const uint8_t *q = a->q + at;
    int64_t width = a->width, stride = a->heads * width, wide = up(width, 2 * TILE);
    int64_t all = up(a->keys, 2 * TILE), deep = up(width, 64);
    _Alignas(64) uint8_t queries[ROWS * MAX_WIDTH];
    Block block;
    float total[ROWS];
    memset(queries, 0, ROWS * deep);
    for (int64_t row = 0; row < ROWS; row++) {
        block.highest[row] = -1e29f;
        block.most[row] = INFINITY;
        if (row < rows) memcpy(queries + row * deep, q + row * stride, width);
    }
    sum_up(queries, all, deep, wide, a->scale, head, &block);
    memcpy(total, block.total, sizeof total);
    int clips = 0; /* the largest probability of a query is 1 / total */
    for (int64_t row = 0; row < ROWS; row++) {
        block.most[row] = largest_probability(a) * total[row];
        clips |= block.most[row] < 1;
    }
    if (clips) sum_up(queries, all, deep, wide, a->scale, head, &block);
    for (int64_t row = 0; row < rows; row++) {
        float *results = block.output + row * wide;
        for (int64_t i = 0; i < width; i++) results[i] /= total[row];
        write_results(a, results, width, at + row * stride);
    }
}

/* Compute attention by tiles, see attention.h. */
void attend_by_tiles(const Attention *a) {
    int64_t keys = a->keys, width = a->width, stride = a->heads * width, heads = a->batch * a->heads;
    int64_t blocks = (a->queries + ROWS - 1) / ROWS, bytes = head_bytes(keys, width);
#pragma omp parallel
    {
        TileConfig before, own = {.palette = 1};
        for (int i = 0; i < 8; i++) own.rows[i] = TILE, own.bytes[i] = 64;
        __asm__ volatile("" ::: "memory"); /* compilers do not see what tile instructions read */
        _tile_storeconfig(&before); /* restored below: oneDNN relies on its own configuration */
        _tile_loadconfig(&own);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < heads; i++) {
            int64_t at = i / a->heads * keys * stride + i % a->heads * width;
            Head head = head_of(a->workspace + i * bytes, keys, width);
            const float *bias = a->bias ? a->bias + i / a->heads * keys : NULL;
            pack_keys(a->k + at, bias, keys, width, stride, -a->scale * a->zero_of_q, head.keys, head.added);
            pack_values(a->v + at, keys, width, stride, a->zero_of_v, head.values);
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < heads * blocks; i++) {
            int64_t head = i / blocks, first = i % blocks * ROWS, rows = a->queries - first;
            int64_t at = (head / a->heads * a->queries + first) * stride + head % a->heads * width;
            attend(a, at, rows < ROWS ? rows : ROWS, head_of(a->workspace + head * bytes, keys, width));
        }
        _tile_loadconfig(&before);
    }
}

#else

/* This CPU has no tiles. */
int64_t has_tiles(void) { return 0; }
int64_t tiles_bytes(int64_t keys, int64_t width) { return (void)keys, (void)width, 0; }
void attend_by_tiles(const Attention *operands) { (void)operands; }

#endif
