/* Attention on codes, for CPUs with matrix tiles (Intel AMX): no matrix of scores is ever in memory.
 *
 * With codes c, zero points Z and steps D the scores of a query i and a key j are, up to what is the same for all keys
 * and so drops out of the softmax,
 *
 *     D_q D_k / sqrt(d) (sum_d c_q c_k - Z_q sum_d c_k)
 *
 * The first sum is one of bytes in tiles, exact in 32 bits. Probabilities are rounded to bfloat16 and multiplied by
 * c_v - Z_v, which bfloat16 holds exactly; sums are float32. Keys come in parts of PART; of those before, a running
 * maximum and a running sum are kept (Milakov and Gimelshein 2018). */
#include "rest.h"

#if defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512DQ__) && \
    defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    TILE = 16,              /* rows of a tile, and numbers of 32 bits in one */
    ROWS = 2 * TILE,        /* queries worked on at a time */
    PART = 256,             /* keys worked on at a time */
    MAX_WIDTH = 256,        /* of a head: beyond, sums of bytes might not fit into float32 */
    REQUEST = 0x1023,       /* arch_prctl: ARCH_REQ_XCOMP_PERM ... */
    TILE_DATA = 18,         /* ... for the state of tiles */
};

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} __attribute__((packed)) TileConfig;

static int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

/* Whether this process may use tiles. */
int64_t has_attention(void) { return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0; }

/* A head's part of the workspace: its keys, its values as pairs of bfloat16, and what each key adds to its scores. */
typedef struct {
    uint8_t *keys;
    uint32_t *values;
    float *added;
} Head;

static int64_t head_bytes(int64_t keys, int64_t width) {
    return up(keys, 2 * TILE) * (up(width, 64) + 2 * up(width, 2 * TILE) + sizeof(float));
}

static Head head_of(uint8_t *workspace, int64_t keys, int64_t width) {
    int64_t all = up(keys, 2 * TILE), deep = up(width, 64), wide = up(width, 2 * TILE);
    return (Head){workspace, (uint32_t *)(workspace + all * deep), (float *)(workspace + all * (deep + 2 * wide))};
}

int64_t attention_bytes(int64_t heads, int64_t keys, int64_t width) { return heads * head_bytes(keys, width); }

/* The keys of a head as tiles want them, 16 side by side, four bytes of each in turn; and what each adds. */
static void pack_keys(const uint8_t *k, int64_t keys, int64_t width, int64_t stride, float factor, uint8_t *packed,
                      float *added) {
    int64_t all = up(keys, 2 * TILE), deep = up(width, 64);
    memset(packed, 0, all * deep);
    for (int64_t key = 0; key < all; key++) {
        int32_t sum = 0;
        uint8_t row[MAX_WIDTH] = {0}, *to = packed + key / TILE * TILE * deep + key % TILE * 4;
        if (key < keys) memcpy(row, k + key * stride, width);
        for (int64_t i = 0; i < deep; i++) sum += row[i];
        for (int64_t i = 0; i < deep / 4; i++) memcpy(to + i * 64, row + i * 4, 4);
        added[key] = key < keys ? factor * sum : -1e30f; /* the probability of those that fill up is 0 */
    }
}

/* The values of a head as tiles want them: pairs of keys side by side, for 16 numbers in turn. */
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
            for (int64_t i = 0; i < TILE; i++) /* whole numbers of 9 bits: cutting them off rounds nothing */
                to[i] = to_bits(pair[0][at + i]) >> 16 | (to_bits(pair[1][at + i]) & 0xffff0000u);
        }
    }
}

/* scores[ROWS][PART] of `count` keys, a multiple of 32; q is [ROWS][deep]. Four sums at a time hide each other's delay. */
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

/* 2^x within 1e-4, relative, for x <= 0: 2^floor(x) times a polynomial of the rest. */
static inline __m512 power_of_2(__m512 x) {
    __m512 rest = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);
    __m512 p = _mm512_set1_ps(0.07802291f);
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(0.22606949f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(0.69583272f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(0.99992526f));
    return _mm512_scalef_ps(p, x);
}

/* 16 scores, times the scale, with what their keys add. */
static inline __m512 logits(const int32_t *scores, const float *added, __m512 scale) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(scores)), scale, _mm512_loadu_ps(added));
}

/* One row of `count` scores, a multiple of 32, -> probabilities, not normalised. Returns the factor that makes those of
 * the parts before comparable with them. */
static float exponentials(const int32_t *scores, const float *added, int64_t count, float scale, float *highest,
                          float *total, uint16_t *out) {
    __m512 scales = _mm512_set1_ps(scale), top = _mm512_set1_ps(*highest), sums = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; i += TILE) top = _mm512_max_ps(top, logits(scores + i, added + i, scales));
    float before = *highest;
    *highest = _mm512_reduce_max_ps(top);
    top = _mm512_set1_ps(*highest);
    for (int64_t i = 0; i < count; i += 2 * TILE) {
        __m512 first = power_of_2(_mm512_sub_ps(logits(scores + i, added + i, scales), top));
        __m512 second = power_of_2(_mm512_sub_ps(logits(scores + i + TILE, added + i + TILE, scales), top));
        sums = _mm512_add_ps(sums, _mm512_add_ps(first, second));
        _mm512_store_si512(out + i, (__m512i)_mm512_cvtne2ps_pbh(second, first));
    }
    float factor = exp2f(before - *highest);
    *total = *total * factor + _mm512_reduce_add_ps(sums);
    return factor;
}

/* output[ROWS][wide] += probabilities[ROWS][PART] values, of `count` keys, a multiple of 32; wide is one of 32. */
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

/* `rows` queries of a head, from q on. */
static void attend(const uint8_t *q, int64_t rows, int64_t keys, int64_t width, int64_t stride, float scale,
                   Head head, Range range, uint8_t *out) {
    int64_t all = up(keys, 2 * TILE), deep = up(width, 64), wide = up(width, 2 * TILE);
    _Alignas(64) uint8_t queries[ROWS * MAX_WIDTH];
    _Alignas(64) int32_t scores[ROWS * PART];
    _Alignas(64) uint16_t probabilities[ROWS * PART];
    _Alignas(64) float output[ROWS * MAX_WIDTH];
    float highest[ROWS], total[ROWS];
    memset(queries, 0, ROWS * deep);
    memset(output, 0, ROWS * wide * sizeof(float));
    for (int64_t row = 0; row < ROWS; row++) {
        highest[row] = -1e29f;
        total[row] = 0;
        if (row < rows) memcpy(queries + row * deep, q + row * stride, width);
    }
    for (int64_t key = 0; key < all; key += PART) {
        int64_t count = all - key < PART ? all - key : PART;
        __asm__ volatile("" ::: "memory");
        multiply_scores(queries, head.keys + key * deep, count, deep, scores);
        for (int64_t row = 0; row < ROWS; row++) {
            float factor = exponentials(scores + row * PART, head.added + key, count, scale, highest + row, total + row,
                                        probabilities + row * PART);
            for (int64_t i = 0; i < wide; i++) output[row * wide + i] *= factor;
        }
        __asm__ volatile("" ::: "memory");
        add_values(probabilities, head.values + key / 2 * wide, count, wide, output);
    }
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t i = 0; i < width; i++) output[row * wide + i] /= total[row];
        quantize_row(output + row * wide, width, range, out + row * stride);
    }
}

/* Codes [batch, queries, heads * width] of softmax(q k^T scale) (v - zero_of_v), of codes q of that shape, and k and v
 * [batch, keys, heads * width]. scale: D_q D_k / sqrt(d), times 1 / ln 2. */
void attention(const uint8_t *q, const uint8_t *k, const uint8_t *v, int64_t batch, int64_t heads, int64_t queries,
               int64_t keys, int64_t width, float scale, float zero_of_q, float zero_of_v, const Range *range,
               uint8_t *workspace, uint8_t *out) {
    int64_t stride = heads * width, blocks = (queries + ROWS - 1) / ROWS, bytes = head_bytes(keys, width);
#pragma omp parallel
    {
        TileConfig before, own = {.palette = 1};
        for (int i = 0; i < 8; i++) own.rows[i] = TILE, own.bytes[i] = 64;
        __asm__ volatile("" ::: "memory"); /* the intrinsics do not tell compilers what they read */
        _tile_storeconfig(&before); /* other libraries rely on theirs */
        _tile_loadconfig(&own);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < batch * heads; i++) {
            int64_t at = i / heads * keys * stride + i % heads * width;
            Head head = head_of(workspace + i * bytes, keys, width);
            pack_keys(k + at, keys, width, stride, -scale * zero_of_q, head.keys, head.added);
            pack_values(v + at, keys, width, stride, zero_of_v, head.values);
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < batch * heads * blocks; i++) {
            int64_t head = i / blocks, first = i % blocks * ROWS;
            int64_t at = (head / heads * queries + first) * stride + head % heads * width;
            int64_t rows = queries - first < ROWS ? queries - first : ROWS;
            attend(q + at, rows, keys, width, stride, scale, head_of(workspace + head * bytes, keys, width), *range, out + at);
        }
        _tile_loadconfig(&before);
    }
}

#else

int64_t has_attention(void) { return 0; }

#endif
