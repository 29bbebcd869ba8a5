/* The most similar destination of each source token, for token merging.
 *
 * Tokens become codes of 8 bits, each with a step of its own: its largest number is 127 steps. The cosine similarity of
 * two tokens is the product of their codes, a whole number, divided by the lengths of both. The matrix of similarities
 * is never in memory. The caller checks shapes. */
#include "rows.h"
#include "vectors.h"

#ifdef VECTORS

enum { MAX_WIDTH = 2048 }; /* of a token */

/* SOURCES are processed together, with PAIR vectors of destinations: so many vectors of sums are in registers. Bytes
 * are multiplied where there are instructions for it, else numbers of 16 bits. The codes of sources are unsigned, less
 * SHIFT. */
#ifdef VNNI
enum { SOURCES = 6, PAIR = 2, CODES = 4, SHIFT = 128 };
typedef uint8_t SourceCode;
typedef int8_t TargetCode;
#define ADD_PRODUCTS(sums, target, source) add_products_8(sums, source, target)
#else
enum { SOURCES = 4, PAIR = 2, CODES = 2, SHIFT = 0 };
typedef int16_t SourceCode;
typedef int16_t TargetCode;
#define ADD_PRODUCTS(sums, target, source) add_products_16(sums, source, target)
#endif

typedef struct {
    int64_t targets, units; /* destinations, and numbers of CODES codes; both padded */
} Sizes;

/* All destinations of a sample. codes: LANES tokens side by side, CODES codes of each in turn. added: what makes up for
 * SHIFT, or for a token that pads what keeps it from being found. scale: 1 / length, 0 for a token that is 0. */
typedef struct {
    TargetCode *codes;
    int32_t *added;
    float *scale;
} Targets;

static Sizes sizes_of(int64_t targets, int64_t width) {
    return (Sizes){up(targets, PAIR * LANES), up(width, CODES) / CODES};
}

/* Return the bytes of Targets: all sizes are multiples of 64. */
static int64_t sample_bytes(Sizes sizes) {
    return sizes.targets * (sizes.units * CODES * (int64_t)sizeof(TargetCode) + 8);
}

static Targets targets_of(uint8_t *workspace, int64_t sample, Sizes sizes) {
    uint8_t *own = workspace + sample * sample_bytes(sizes);
    Targets targets = {.codes = (TargetCode *)own};
    targets.added = (int32_t *)(targets.codes + sizes.targets * sizes.units * CODES);
    targets.scale = (float *)(targets.added + sizes.targets);
    return targets;
}

/* Return the bytes of the workspace that `nearest` needs; 0 if there is no such kernel on this CPU. */
int64_t nearest_bytes(int64_t batch, int64_t targets, int64_t width) {
    return batch * sample_bytes(sizes_of(targets, width)) + 64;
}

/* Write the codes of a token, and zeros up to a multiple of CODES. Return 1 / their length, 0 for a token that is 0.
 * sum: of the codes. */
static float codes_of(const void *x, int64_t bfloat16, int64_t start, int64_t width, int32_t *codes, int32_t *sum) {
    float most = 0, part[CHUNK];
    int64_t squares = 0;
    *sum = 0;
    for (int64_t i = width; i < up(width, CODES); i++) codes[i] = 0;
    for (int64_t at = 0; at < width; at += CHUNK) {
        int64_t count = width - at < CHUNK ? width - at : CHUNK;
        load(x, bfloat16, start + at, count, part);
        for (int64_t i = 0; i < count; i++) most = fabsf(part[i]) > most ? fabsf(part[i]) : most;
    }
    const float steps = most > 1e-30f ? 127 / most : 0; /* of smaller tokens, steps would be infinite */
    for (int64_t at = 0; at < width; at += CHUNK) {
        int64_t count = width - at < CHUNK ? width - at : CHUNK;
        int32_t own = 0, own_squares = 0;
        load(x, bfloat16, start + at, count, part);
        for (int64_t i = 0; i < count; i++) {
            int32_t code = (int32_t)rintf(part[i] * steps);
            codes[at + i] = code;
            own += code;
            own_squares += code * code;
        }
        *sum += own;
        squares += own_squares;
    }
    return squares > 0 ? (float)(1 / sqrt((double)squares)) : 0;
}

/* Lay out one destination; `place` is its token, or -1 for one that pads, which must not be found. */
static void pack_target(const void *x, int64_t bfloat16, int64_t place, int64_t width, int64_t target, Sizes sizes,
                        Targets to) {
    TargetCode *packed = to.codes + (target / LANES * sizes.units * LANES + target % LANES) * CODES;
    int32_t codes[MAX_WIDTH], sum;
    if (place < 0) {
        for (int64_t unit = 0; unit < sizes.units; unit++) memset(packed + unit * LANES * CODES, 0, 4);
        to.scale[target] = 1, to.added[target] = INT32_MIN / 2;
        return;
    }
    to.scale[target] = codes_of(x, bfloat16, place * width, width, codes, &sum);
    to.added[target] = -SHIFT * sum;
    for (int64_t unit = 0; unit < sizes.units; unit++)
        for (int64_t i = 0; i < CODES; i++)
            packed[unit * LANES * CODES + i] = (TargetCode)codes[unit * CODES + i];
}

/* Find the best destinations for SOURCES sources, and the similarities times the lengths of the sources. */
static void find(const int32_t *sources, Targets targets, Sizes sizes, float *best, int64_t *partner) {
    Floats highest[SOURCES];
    Ints where[SOURCES];
    for (int row = 0; row < SOURCES; row++) highest[row] = all_floats(-INFINITY), where[row] = all_ints(0);
    for (int64_t target = 0; target < sizes.targets; target += PAIR * LANES) {
        Ints sums[SOURCES][PAIR];
        for (int row = 0; row < SOURCES; row++)
            for (int i = 0; i < PAIR; i++) sums[row][i] = load_ints(targets.added + target + i * LANES);
        for (int64_t unit = 0; unit < sizes.units; unit++) {
            Ints codes[PAIR];
            for (int i = 0; i < PAIR; i++)
                codes[i] = load_ints(targets.codes + (target * sizes.units + (i * sizes.units + unit) * LANES) * CODES);
            for (int row = 0; row < SOURCES; row++) {
                Ints own = all_ints(sources[row * sizes.units + unit]);
                for (int i = 0; i < PAIR; i++) sums[row][i] = ADD_PRODUCTS(sums[row][i], codes[i], own);
            }
        }
        for (int i = 0; i < PAIR; i++) {
            Floats scale = load_floats(targets.scale + target + i * LANES);
            Ints number = all_ints((int32_t)(target + i * LANES));
            for (int row = 0; row < SOURCES; row++)
                keep_higher(mul_floats(to_floats(sums[row][i]), scale), number, &highest[row], &where[row]);
        }
    }
    for (int row = 0; row < SOURCES; row++) {
        float values[LANES];
        int32_t numbers[LANES];
        store_floats(values, highest[row]);
        store_ints(numbers, where[row]);
        best[row] = values[0], partner[row] = numbers[0];
        for (int lane = 1; lane < LANES; lane++) { /* the first of equals */
            int64_t number = numbers[lane] + lane;
            if (values[lane] > best[row] || (values[lane] == best[row] && number < partner[row]))
                best[row] = values[lane], partner[row] = number;
        }
    }
}

/* Find the most similar destination of each source, and the similarity.
 * x: [batch, tokens, width]. sources, targets: the places of `n_sources` and `n_targets` tokens.
 * best: float32 [batch, n_sources]. partner: [batch, n_sources], places in `targets`; the first of equals. */
void nearest(const void *x, int64_t bfloat16, int64_t batch, int64_t tokens, int64_t width, const int64_t *sources,
             int64_t n_sources, const int64_t *targets, int64_t n_targets, uint8_t *workspace, float *best,
             int64_t *partner) {
    Sizes sizes = sizes_of(n_targets, width);
    int64_t groups = up(n_sources, SOURCES) / SOURCES;
    uint8_t *start = (uint8_t *)up((int64_t)workspace, 64);
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < batch * sizes.targets; i++) {
            int64_t sample = i / sizes.targets, target = i % sizes.targets;
            int64_t place = target < n_targets ? sample * tokens + targets[target] : -1;
            pack_target(x, bfloat16, place, width, target, sizes, targets_of(start, sample, sizes));
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < batch * groups; i++) {
            int64_t sample = i / groups, first = i % groups * SOURCES, row_codes = sizes.units * CODES;
            _Alignas(64) SourceCode rows[SOURCES * MAX_WIDTH]; /* read as numbers of 32 bits */
            float scale[SOURCES], found[SOURCES];
            int64_t places[SOURCES];
            for (int64_t row = 0; row < SOURCES; row++) {
                int32_t codes[MAX_WIDTH], sum;
                int64_t source = first + row < n_sources ? first + row : n_sources - 1;
                scale[row] = codes_of(x, bfloat16, (sample * tokens + sources[source]) * width, width, codes, &sum);
                for (int64_t k = 0; k < row_codes; k++) rows[row * row_codes + k] = (SourceCode)(codes[k] + SHIFT);
            }
            find((const int32_t *)rows, targets_of(start, sample, sizes), sizes, found, places);
            for (int64_t row = 0; row < SOURCES && first + row < n_sources; row++) {
                best[sample * n_sources + first + row] = found[row] * scale[row];
                partner[sample * n_sources + first + row] = places[row];
            }
        }
    }
}

#else

/* This CPU has no such vectors: PyTorch compares tokens. */
int64_t nearest_bytes(int64_t batch, int64_t targets, int64_t width) {
    (void)batch, (void)targets, (void)width;
    return 0;
}

#endif
