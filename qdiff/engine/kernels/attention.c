/* Attention on codes. Both products are sums of whole numbers; the matrix of scores is never in memory.
 *
 * With the names of attention.h, the logit of a query i and a key j is
 *
 *     scale (sum_d (c_q - 128) c_k + (128 - Z_q) sum_d c_k) + the key's bias
 *
 * up to terms that are the same for all keys of a query, which drop out of the softmax. The parentheses hold a whole
 * number, the score; the bias is rounded to such numbers. The probability of a key is 2^(logit - the highest logit), a
 * whole number of 16 bits in units of 1 / UNIT. It is multiplied by c_v - 128, which has 8 bits. So 32 bits hold the
 * sums over PART keys; float32 adds these up. The sum of the probabilities divides the result, and 128 - Z_v is added
 * to it.
 *
 * Keys are processed in parts. A running maximum and a running sum combine the parts (Milakov and Gimelshein
 * 2018, online softmax). A quantizer of the softmax whose step is coarser than the unit, or whose range ends below a
 * probability, takes a second pass, in which maximum and sum are known: see `attend`. */
#include "attention.h"
#include "vectors.h"

#ifdef VECTORS

/* GROUP queries are processed together, each with so many vectors of sums in registers. Other numbers were slower. */
#if defined(__AVX512F__)
enum { GROUP = 6, SCORE_VECTORS = 2, VALUE_VECTORS = 2 };
#else
enum { GROUP = 4, SCORE_VECTORS = 2, VALUE_VECTORS = 2 };
#endif
enum {
    BLOCK = 16 * GROUP,   /* queries that a thread takes at a time: a part of the keys stays in its cache meanwhile */
    PART = 256,           /* keys processed at a time: 65535 * 128 * 256 is below 2^31 */
    UNIT = 65535,         /* a probability of 1 */
    NARROW = 64,          /* up to this width of a head, scores without a bias are below 2^22 */
    BASE = 0x4b400000,    /* the bits of the float 2^23 + 2^22: added to a narrow head's score, they are a float */
    UNSEEN = -0x0eb60d36, /* what keys that no query sees add to their scores; as a float it is -10^30 */
};
/* How many codes a number of 32 bits holds: four bytes, or two numbers of 16 bits. */
#ifdef VNNI
enum { CODES = 4 };
typedef uint8_t KeyCode;
typedef int8_t QueryCode;
#define ADD_SCORES add_products_8
#else
enum { CODES = 2 };
typedef int16_t KeyCode;
typedef int16_t QueryCode;
#define ADD_SCORES add_products_16
#endif
#define INLINE static inline __attribute__((always_inline))

/* Sizes of a head. keys: a multiple of 2 LANES. units: of CODES codes. full: vectors of LANES values. tail: 1 if up to
 * LANES / 2 values are left, else 0; with more than that left, there is a further full vector. narrow: see NARROW. */
typedef struct {
    int64_t keys, units, full, tail, narrow;
} Sizes;

/* One head's keys and values as the products read them.
 * keys: LANES keys side by side, CODES codes of each in turn. added: what each key adds to its scores.
 * values: numbers of 32 bits that hold c_v - 128 of two keys. A row has those of four keys: the full vectors of the
 * first two keys, those of the other two, and the tails of both, number by number. starts: for each part, 2^15 times
 * the sum of its values, as probabilities are multiplied less 2^15. */
typedef struct {
    KeyCode *keys;
    int32_t *added, *starts, *values;
} Head;

static Sizes sizes_of(int64_t keys, int64_t width) {
    int64_t left = width % LANES;
    return (Sizes){
        .keys = up(keys, 2 * LANES),
        .units = up(width, CODES) / CODES,
        .full = width / LANES + (left > LANES / 2),
        .tail = left > 0 && left <= LANES / 2,
        .narrow = width <= NARROW,
    };
}

/* Return the values of four keys, and of a query's output. */
static int64_t row_width(Sizes sizes) { return (2 * sizes.full + sizes.tail) * LANES; }
static int64_t out_width(Sizes sizes) { return (sizes.full + sizes.tail) * LANES; }

/* Return the bytes of a Head. */
static int64_t head_bytes(Sizes sizes) {
    int64_t codes = sizes.keys * sizes.units * CODES * (int64_t)sizeof(KeyCode), parts = up(sizes.keys, PART) / PART;
    return up(codes + 4 * (sizes.keys / 4 * row_width(sizes) + parts * out_width(sizes) + sizes.keys), 64);
}

/* Return the Head whose arrays begin at `workspace`. */
static Head head_of(uint8_t *workspace, Sizes sizes) {
    Head head;
    head.keys = (KeyCode *)workspace;
    head.values = (int32_t *)(head.keys + sizes.keys * sizes.units * CODES);
    head.starts = head.values + sizes.keys / 4 * row_width(sizes);
    head.added = head.starts + up(sizes.keys, PART) / PART * out_width(sizes);
    return head;
}

/* Return 1 if this CPU has attention. */
int64_t has_attention(void) { return 1; }

/* Return the bytes of the workspace that `attention` needs; heads: batch times heads. */
int64_t attention_bytes(int64_t heads, int64_t keys, int64_t width) {
    int64_t own = head_bytes(sizes_of(keys, width)), tiles = tiles_bytes(keys, width);
    return heads * (own > tiles ? own : tiles) + 64;
}

/* --- keys and values ------------------------------------------------------------------------------------------- */

/* Return what the bias of a key adds to its scores: a whole number of steps of `scale`, which are fine. */
static int32_t score_of_bias(const Attention *a, int64_t key) {
    return a->bias ? (int32_t)lrintf(fminf(fmaxf(a->bias[key] / a->scale, -1e9f), 1e9f)) : 0;
}

/* Return 1 if the biases leave the scores of a narrow head below 2^22. */
static int has_room(const Attention *a) {
    float room = (1 << 22) - (128 + fabsf(128 - a->zero_of_q)) * 255 * a->width;
    for (int64_t i = 0; a->bias && i < a->batch * a->keys; i++)
        if (fabsf(a->bias[i]) > room * a->scale) return 0;
    return 1;
}

/* Lay out the keys of a head. Those that the mask hides, and those that pad, are 0. */
static void pack_keys(const Attention *a, int64_t batch, int64_t head, Sizes sizes, Head to) {
    int64_t stride = a->heads * a->width;
    int32_t base = sizes.narrow ? BASE : 0, factor = 128 - (int32_t)a->zero_of_q;
    const uint8_t *k = a->k + batch * a->keys * stride + head * a->width, *mask = a->mask;
    for (int64_t key = 0; key < sizes.keys; key++) {
        int seen = key < a->keys && !(mask && !mask[batch * a->keys + key]);
        KeyCode *packed = to.keys + (key / LANES * sizes.units * LANES + key % LANES) * CODES, row[MAX_WIDTH];
        int32_t sum = 0;
        memset(row + sizes.units * CODES - CODES, 0, CODES * sizeof(KeyCode));
        for (int64_t i = 0; i < a->width; i++) {
            row[i] = seen ? k[key * stride + i] : 0;
            sum += row[i];
        }
        for (int64_t i = 0; i < sizes.units; i++) memcpy(packed + i * LANES * CODES, row + i * CODES, 4);
        to.added[key] = seen ? factor * sum + base + score_of_bias(a, batch * a->keys + key) : UNSEEN;
    }
}

/* Lay out the values of a head. Those of keys that pad are 0. */
static void pack_values(const Attention *a, int64_t batch, int64_t head, Sizes sizes, Head to) {
    static const uint8_t nothing[MAX_WIDTH];
    int64_t stride = a->heads * a->width, together = sizes.full * LANES, left = a->width - together;
    const uint8_t *v = a->v + batch * a->keys * stride + head * a->width;
    memset(to.values, 0, sizes.keys / 4 * row_width(sizes) * sizeof(int32_t));
    memset(to.starts, 0, up(sizes.keys, PART) / PART * out_width(sizes) * sizeof(int32_t));
    for (int64_t pair = 0; pair < sizes.keys / 2; pair++) {
        int64_t key = pair / LANES * 2 * LANES + packed_key(2 * (pair % LANES)), there = a->keys - key;
        const uint8_t *first = there > 0 ? v + key * stride : nothing;
        const uint8_t *second = there > 1 ? v + (key + 1) * stride : nothing;
        int32_t zeros[2] = {there > 0 ? 128 : 0, there > 1 ? 128 : 0};
        int32_t *start = to.starts + key / PART * out_width(sizes), *row = to.values + pair / 2 * row_width(sizes);
        int16_t *packed = (int16_t *)(row + pair % 2 * together), *tail = (int16_t *)(row + 2 * together + pair % 2);
        for (int64_t i = 0; i < a->width && i < together; i++) {
            packed[2 * i] = (int16_t)(first[i] - zeros[0]);
            packed[2 * i + 1] = (int16_t)(second[i] - zeros[1]);
            start[i] += (packed[2 * i] + packed[2 * i + 1]) * (1 << 15);
        }
        for (int64_t i = 0; i < left; i++) {
            tail[4 * i] = (int16_t)(first[together + i] - zeros[0]);
            tail[4 * i + 1] = (int16_t)(second[together + i] - zeros[1]);
            start[together + 2 * i] += (tail[4 * i] + tail[4 * i + 1]) * (1 << 15);
        }
    }
}

/* --- one group of queries -------------------------------------------------------------------------------------- */

/* Find the scores of GROUP queries with SCORE_VECTORS vectors of keys. Raise `highest` to them. */
INLINE void vectors_scores(const int32_t *q, const KeyCode *keys, const int32_t *added, int64_t units,
                           Ints *highest, int32_t *scores) {
    Ints sums[GROUP][SCORE_VECTORS];
    for (int row = 0; row < GROUP; row++)
        for (int i = 0; i < SCORE_VECTORS; i++) sums[row][i] = load_ints(added + i * LANES);
    for (int64_t unit = 0; unit < units; unit++) {
        Ints k[SCORE_VECTORS];
        for (int i = 0; i < SCORE_VECTORS; i++) k[i] = load_ints(keys + (i * units + unit) * LANES * CODES);
        for (int row = 0; row < GROUP; row++) {
            Ints codes = all_ints(q[row * units + unit]);
            for (int i = 0; i < SCORE_VECTORS; i++) sums[row][i] = ADD_SCORES(sums[row][i], k[i], codes);
        }
    }
    for (int row = 0; row < GROUP; row++)
        for (int i = 0; i < SCORE_VECTORS; i++) {
            highest[row] = max_ints(highest[row], sums[row][i]);
            store_ints(scores + row * PART + i * LANES, sums[row][i]);
        }
}

/* Find the scores [GROUP, PART] of GROUP queries with `count` keys, a multiple of 2 LANES. Raise `highest` to them. */
static void part_scores(const int32_t *q, const KeyCode *keys, const int32_t *added, int64_t units, int64_t count,
                        int32_t *highest, int32_t *scores) {
    int64_t width = units * CODES;
    Ints top[GROUP];
    for (int row = 0; row < GROUP; row++) top[row] = all_ints(highest[row]);
    for (int64_t key = 0; key < count; key += SCORE_VECTORS * LANES)
        vectors_scores(q, keys + key * width, added + key, units, top, scores + key);
    for (int row = 0; row < GROUP; row++) highest[row] = highest_int(top[row]);
}

/* Return the logits, less the highest one, of LANES scores. */
INLINE Floats logits(const int32_t *scores, Floats scale, Floats offset, const int narrow) {
    Ints from = load_ints(scores);
    return fma_floats(narrow ? as_floats(from) : to_floats(from), scale, offset);
}

/* Return 2^x times what the polynomial is multiplied by. */
INLINE Floats powers(Floats x, const Floats *polynomial) {
    Floats part = above_floor(x), y = fma_floats(polynomial[0], part, polynomial[1]);
    y = fma_floats(fma_floats(y, part, polynomial[2]), part, polynomial[3]);
    return scale_floats(y, x);
}

/* Turn `count` scores of a query into probabilities in units of 1 / unit, and return their sum. They are written less
 * 2^15, in the order of pack_16. most: what they must not exceed, where `clamp` is 1. */
INLINE float exponentials(const int32_t *scores, int64_t count, float scale, float offset, float unit, float most,
                          const int narrow, const int clamp, int32_t *out) {
    Floats scales = all_floats(scale), offsets = all_floats(offset), mosts = all_floats(most), polynomial[4];
    Ints sums = all_ints(0), ones = all_ints(0x00010001);
    for (int i = 0; i < 4; i++) polynomial[i] = all_floats(POWER_OF_2[i] * unit);
    for (int64_t i = 0; i < count; i += 2 * LANES) {
        Floats first = powers(logits(scores + i, scales, offsets, narrow), polynomial);
        Floats second = powers(logits(scores + i + LANES, scales, offsets, narrow), polynomial);
        if (clamp) first = min_floats(first, mosts), second = min_floats(second, mosts);
        Ints both = pack_16(first, second);
        sums = add_products_16(sums, both, ones);
        store_ints(out + i / 2, both);
    }
    return sum_floats(to_floats(sums)) + (float)count * (1 << 15);
}

/* Add probabilities times values to `vectors` full vectors, and to the tail if there is one, of GROUP outputs. */
INLINE void add_vectors(const int32_t *pairs, const int32_t *values, const int32_t *tails, const int32_t *start,
                        int64_t count, Sizes sizes, const int vectors, const int tail, float *out) {
    Ints sums[GROUP][VALUE_VECTORS + 1];
    for (int row = 0; row < GROUP; row++)
        for (int i = 0; i < vectors + tail; i++) sums[row][i] = load_ints(start + i * LANES);
    for (int64_t pair = 0; pair < count / 2; pair += 2) {
        const int32_t *from = values + pair / 2 * row_width(sizes);
        for (int k = 0; k < 2; k++)
            for (int i = 0; i < vectors; i++) {
                Ints v = load_ints(from + (k * sizes.full + i) * LANES);
                for (int row = 0; row < GROUP; row++)
                    sums[row][i] = add_products_16(sums[row][i], v, all_ints(pairs[row * PART / 2 + pair + k]));
            }
        if (!tail) continue;
        Ints v = load_ints(tails + pair / 2 * row_width(sizes));
        for (int row = 0; row < GROUP; row++) {
            int64_t both;
            memcpy(&both, pairs + row * PART / 2 + pair, sizeof both);
            sums[row][vectors] = add_products_16(sums[row][vectors], v, all_longs(both));
        }
    }
    for (int row = 0; row < GROUP; row++)
        for (int i = 0; i < vectors + tail; i++) {
            float *to = out + row * out_width(sizes) + i * LANES;
            Ints sum = i < vectors ? sums[row][i] : add_ints(sums[row][i], swap_pairs(sums[row][i]));
            store_floats(to, add_floats(to_floats(sum), load_floats(to)));
        }
}

/* Add probabilities [GROUP, PART] times the values of `count` keys to out [GROUP, out_width]. */
static void add_values(const int32_t *pairs, const int32_t *values, const int32_t *start, int64_t count, Sizes sizes,
                       float *out) {
    int64_t at = 0;
    const int32_t *tails = values + 2 * sizes.full * LANES;
#define ADD(vectors, tail) \
    add_vectors(pairs, values + at * LANES, tails, start + at * LANES, count, sizes, vectors, tail, out + at * LANES)
    for (; at + VALUE_VECTORS < sizes.full; at += VALUE_VECTORS) ADD(VALUE_VECTORS, 0);
    switch (2 * (sizes.full - at) + sizes.tail) {
        // clang-format off
        case 1: ADD(0, 1); break;
        case 2: ADD(1, 0); break;
        case 3: ADD(1, 1); break;
        case 4: ADD(2, 0); break;
        case 5: ADD(2, 1); break;
        // clang-format on
    }
#undef ADD
}

/* What is known of GROUP queries. A logit less the highest one is score * scale + offset. total: sum of probabilities,
 * in units of 1 / UNIT of the highest. */
typedef struct {
    int32_t highest[GROUP];
    float offset[GROUP], total[GROUP];
    _Alignas(64) float out[GROUP * (MAX_WIDTH + LANES)];
} Group;

/* Raise the highest score of a query, and scale down what was summed up with the earlier one. */
static void raise_highest(Group *group, int row, int32_t highest, float scale, Sizes sizes) {
    float offset = -(sizes.narrow ? from_bits((uint32_t)highest) : (float)highest) * scale;
    offset -= fabsf(offset) * 0x1p-23f; /* so that rounding leaves no logit above the highest one */
    if (group->total[row] > 0) {
        float factor = exp2f(offset - group->offset[row]);
        group->total[row] *= factor;
        for (int64_t i = 0; i < out_width(sizes); i++) group->out[row * out_width(sizes) + i] *= factor;
    }
    group->offset[row] = offset;
    group->highest[row] = highest;
}

/* Until a key is seen, an offset makes all probabilities 0. */
static void start_group(Group *group, Sizes sizes) {
    memset(group->out, 0, GROUP * out_width(sizes) * sizeof(float));
    for (int row = 0; row < GROUP; row++) {
        group->highest[row] = UNSEEN;
        group->offset[row] = -1e30f;
        group->total[row] = 0;
    }
}

/* Add the keys [key, key + PART) to a group whose queries are q. Without `final`, highest scores and totals are found
 * on the way. Else they are those of *final, and probabilities are codes of the quantizer of the softmax. */
static void add_part(const Attention *a, const int32_t *q, Sizes sizes, Head head, int64_t key, const Group *final,
                     Group *group) {
    _Alignas(64) int32_t scores[GROUP * PART], pairs[GROUP * PART / 2];
    int32_t highest[GROUP];
    int64_t count = sizes.keys - key < PART ? sizes.keys - key : PART;
    memcpy(highest, group->highest, sizeof highest);
    part_scores(q, head.keys + key * sizes.units * CODES, head.added + key, sizes.units, count, highest, scores);
    for (int row = 0; row < GROUP; row++) {
        const int32_t *own = scores + row * PART;
        int32_t *to = pairs + row * PART / 2;
        float total;
        if (final) {
            float unit = final->total[row] > 0 ? UNIT / (final->total[row] * a->softmax_delta) : 1;
            total = exponentials(own, count, a->scale, final->offset[row], unit, a->softmax_high, sizes.narrow, 1, to);
        } else {
            if (highest[row] > group->highest[row]) raise_highest(group, row, highest[row], a->scale, sizes);
            float offset = group->offset[row];
            total = sizes.narrow ? exponentials(own, count, a->scale, offset, UNIT, 0, 1, 0, to)
                                 : exponentials(own, count, a->scale, offset, UNIT, 0, 0, 0, to);
        }
        group->total[row] += total;
    }
    add_values(pairs, head.values + key / 4 * row_width(sizes), head.starts + key / PART * out_width(sizes), count,
               sizes, group->out);
}

/* Return 1 if the steps of the softmax are larger than the unit. */
static int has_coarse_softmax(const Attention *a) { return a->softmax_delta * UNIT > 1.001f; }

/* Return 1 if the softmax of a group has to be quantized in a second pass. */
static int needs_quantizer(const Attention *a, const Group *group) {
    if (has_coarse_softmax(a)) return 1;
    for (int row = 0; row < GROUP; row++)
        if (group->total[row] > 0 && UNIT > group->total[row] * largest_probability(a)) return 1;
    return 0;
}

/* Quantize the results of the first `rows` queries of a group. factor: 0 to divide by the totals. A query that sees no
 * key gets 0. */
static void write_group(const Attention *a, const Group *group, int64_t rows, Sizes sizes, float factor, int64_t at) {
    for (int64_t row = 0; row < rows; row++) {
        float results[MAX_WIDTH], total = group->total[row], zero = total * (128 - a->zero_of_v);
        float times = total > 0 ? (factor > 0 ? factor : 1 / total) : 0;
        const float *sums = group->out + row * out_width(sizes), *tail = sums + sizes.full * LANES;
        int64_t together = sizes.full * LANES < a->width ? sizes.full * LANES : a->width;
        for (int64_t i = 0; i < together; i++) results[i] = (sums[i] + zero) * times;
        for (int64_t i = together; i < a->width; i++) results[i] = (tail[2 * (i - together)] + zero) * times;
        write_results(a, results, a->width, at + row * a->heads * a->width);
    }
}

/* Compute attention for up to BLOCK queries of a head, the first of them at place `at`, and quantize the results. */
static void attend(const Attention *a, int64_t at, int64_t rows, Sizes sizes, Head head) {
    const uint8_t *q = a->q + at;
    int64_t stride = a->heads * a->width, width = sizes.units * CODES, groups = up(rows, GROUP) / GROUP;
    _Alignas(64) QueryCode queries[BLOCK * MAX_WIDTH];
    Group all[BLOCK / GROUP];
    memset(queries, 0, groups * GROUP * width * sizeof(QueryCode));
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < a->width; i++) queries[row * width + i] = (QueryCode)(q[row * stride + i] - 128);
    const int32_t *q_units = (const int32_t *)queries;
    for (int64_t i = 0; i < groups; i++) start_group(all + i, sizes);
    for (int64_t key = 0; key < sizes.keys; key += PART)
        for (int64_t i = 0; i < groups; i++)
            add_part(a, q_units + i * GROUP * sizes.units, sizes, head, key, NULL, all + i);
    for (int64_t i = 0; i < groups; i++) {
        int64_t first = i * GROUP, count = rows - first < GROUP ? rows - first : GROUP;
        if (!needs_quantizer(a, all + i)) {
            write_group(a, all + i, count, sizes, 0, at + first * stride);
            continue;
        }
        Group quantized;
        start_group(&quantized, sizes);
        for (int64_t key = 0; key < sizes.keys; key += PART)
            add_part(a, q_units + first * sizes.units, sizes, head, key, all + i, &quantized);
        write_group(a, &quantized, count, sizes, a->softmax_delta, at + first * stride);
    }
}

/* --- all queries ----------------------------------------------------------------------------------------------- */

static void attend_by_vectors(const Attention *a) {
    int64_t stride = a->heads * a->width, blocks = (a->queries + BLOCK - 1) / BLOCK;
    Sizes sizes = sizes_of(a->keys, a->width);
    sizes.narrow = sizes.narrow && has_room(a);
    uint8_t *workspace = (uint8_t *)up((int64_t)a->workspace, 64);
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < a->batch * a->heads; i++) {
            Head head = head_of(workspace + i * head_bytes(sizes), sizes);
            pack_keys(a, i / a->heads, i % a->heads, sizes, head);
            pack_values(a, i / a->heads, i % a->heads, sizes, head);
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < a->batch * a->heads * blocks; i++) {
            int64_t head = i / blocks, first = i % blocks * BLOCK, rows = a->queries - first;
            int64_t at = (head / a->heads * a->queries + first) * stride + head % a->heads * a->width;
            attend(a, at, rows < BLOCK ? rows : BLOCK, sizes, head_of(workspace + head * head_bytes(sizes), sizes));
        }
    }
}

/* Quantize softmax(q k^T) (v - zero_of_v). The arguments are those of struct Attention; exactly one of out and floats
 * is NULL. */
void attention(const uint8_t *q, const uint8_t *k, const uint8_t *v, const uint8_t *mask, const float *bias,
               int64_t batch, int64_t heads, int64_t queries, int64_t keys, int64_t width, float scale, float zero_of_q,
               float zero_of_v, float softmax_delta, float softmax_high, const QuantParams *params, uint8_t *workspace,
               uint8_t *out, float *floats) {
    Attention a = {
        .q = q, .k = k, .v = v, .mask = mask, .bias = bias, .batch = batch, .heads = heads, .queries = queries,
        .keys = keys, .width = width, .scale = scale, .zero_of_q = zero_of_q, .zero_of_v = zero_of_v,
        .softmax_delta = softmax_delta, .softmax_high = softmax_high, .params = *params, .workspace = workspace,
        .out = out, .floats = floats};
    if (has_tiles() && !mask && !has_coarse_softmax(&a))
        attend_by_tiles(&a);
    else
        attend_by_vectors(&a);
}

#else

/* This CPU has no such vectors: PyTorch computes attention. */
int64_t has_attention(void) { return 0; }

#endif
