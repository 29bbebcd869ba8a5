/* Vectors of 32-bit numbers: the few operations that integer kernels need, by AVX-512 or AVX2 instructions. Both parts
 * of this file define the same names.
 *
 * VECTORS is defined where the compiler may use either. LANES numbers are in a vector. Sums of products of 8-bit
 * numbers use VNNI instructions where there are any. Without them numbers are multiplied as 16-bit ones, as the
 * 8-bit instruction of AVX2 saturates its sums. Everything here is exact but the functions on floats. */
#ifndef DSDIFF_VECTORS_H
#define DSDIFF_VECTORS_H

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define VECTORS
#include <immintrin.h>

enum { LANES = 16 };
typedef __m512i Ints;
typedef __m512 Floats;

static inline Ints load_ints(const void *from) { return _mm512_loadu_si512(from); }
static inline void store_ints(void *to, Ints x) { _mm512_storeu_si512(to, x); }
static inline Ints all_ints(int32_t x) { return _mm512_set1_epi32(x); }
static inline Ints all_longs(int64_t x) { return _mm512_set1_epi64(x); }
static inline Ints add_ints(Ints x, Ints y) { return _mm512_add_epi32(x, y); }
static inline Ints max_ints(Ints x, Ints y) { return _mm512_max_epi32(x, y); }
static inline int32_t highest_int(Ints x) { return _mm512_reduce_max_epi32(x); }
static inline Floats as_floats(Ints x) { return _mm512_castsi512_ps(x); }
static inline Floats load_floats(const float *from) { return _mm512_loadu_ps(from); }
static inline void store_floats(float *to, Floats x) { _mm512_storeu_ps(to, x); }
static inline Floats all_floats(float x) { return _mm512_set1_ps(x); }
static inline Floats to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }
static inline Floats add_floats(Floats x, Floats y) { return _mm512_add_ps(x, y); }
static inline Floats mul_floats(Floats x, Floats y) { return _mm512_mul_ps(x, y); }
static inline Floats min_floats(Floats x, Floats y) { return _mm512_min_ps(x, y); }
/* Where x is above *highest, put it there, and its number into *where. */
static inline void keep_higher(Floats x, Ints number, Floats *highest, Ints *where) {
    __mmask16 higher = _mm512_cmp_ps_mask(x, *highest, _CMP_GT_OQ);
    *highest = _mm512_mask_mov_ps(*highest, higher, x);
    *where = _mm512_mask_mov_epi32(*where, higher, number);
}
/* x y + z */
static inline Floats fma_floats(Floats x, Floats y, Floats z) { return _mm512_fmadd_ps(x, y, z); }
static inline float sum_floats(Floats x) { return _mm512_reduce_add_ps(x); }
/* x - floor(x) */
static inline Floats above_floor(Floats x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF); }
/* x 2^floor(n) */
static inline Floats scale_floats(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }
/* x, with the numbers of each pair exchanged */
static inline Ints swap_pairs(Ints x) { return _mm512_shuffle_epi32(x, 0xb1); }

/* Return 2 LANES whole numbers of [0, 2^16), as 16-bit numbers less 2^15, in the order of `packed_key`. Adding
 * 2^23 + 2^22 to a float rounds it, and leaves the whole number in its lowest bits. */
static inline Ints pack_16(Floats x, Floats y) {
    static const int16_t evens[32] = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                      32, 34, 36, 38, 40, 42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62};
    const Floats whole = all_floats(0x1.8p23f - 0x1p15f);
    return _mm512_permutex2var_epi16(_mm512_castps_si512(add_floats(x, whole)), _mm512_loadu_si512(evens),
                                     _mm512_castps_si512(add_floats(y, whole)));
}
/* Return which of 2 LANES numbers is at a place. */
static inline int64_t packed_key(int64_t place) { return place; }

#ifdef __AVX512VNNI__
#define VNNI
/* As assembly, because GCC copies the sums of intrinsics from register to register. */
static inline Ints add_products_8(Ints sums, Ints x, Ints y) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(x), "v"(y));
    return sums;
}
static inline Ints add_products_16(Ints sums, Ints x, Ints y) {
    __asm__("vpdpwssd %2, %1, %0" : "+v"(sums) : "v"(x), "v"(y));
    return sums;
}
#else
static inline Ints add_products_16(Ints sums, Ints x, Ints y) {
    return _mm512_add_epi32(sums, _mm512_madd_epi16(x, y));
}
#endif

#elif defined(__AVX2__) && defined(__FMA__)
#define VECTORS
#include <immintrin.h>

enum { LANES = 8 };
typedef __m256i Ints;
typedef __m256 Floats;

static inline Ints load_ints(const void *from) { return _mm256_loadu_si256(from); }
static inline void store_ints(void *to, Ints x) { _mm256_storeu_si256(to, x); }
static inline Ints all_ints(int32_t x) { return _mm256_set1_epi32(x); }
static inline Ints all_longs(int64_t x) { return _mm256_set1_epi64x(x); }
static inline Ints add_ints(Ints x, Ints y) { return _mm256_add_epi32(x, y); }
static inline Ints max_ints(Ints x, Ints y) { return _mm256_max_epi32(x, y); }
static inline int32_t highest_int(Ints x) {
    __m128i y = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    y = _mm_max_epi32(y, _mm_shuffle_epi32(y, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(y, _mm_shuffle_epi32(y, 0xb1)));
}
static inline Floats as_floats(Ints x) { return _mm256_castsi256_ps(x); }
static inline Floats load_floats(const float *from) { return _mm256_loadu_ps(from); }
static inline void store_floats(float *to, Floats x) { _mm256_storeu_ps(to, x); }
static inline Floats all_floats(float x) { return _mm256_set1_ps(x); }
static inline Floats to_floats(Ints x) { return _mm256_cvtepi32_ps(x); }
static inline Floats add_floats(Floats x, Floats y) { return _mm256_add_ps(x, y); }
static inline Floats mul_floats(Floats x, Floats y) { return _mm256_mul_ps(x, y); }
static inline Floats min_floats(Floats x, Floats y) { return _mm256_min_ps(x, y); }
/* Where x is above *highest, put it there, and its number into *where. */
static inline void keep_higher(Floats x, Ints number, Floats *highest, Ints *where) {
    __m256 higher = _mm256_cmp_ps(x, *highest, _CMP_GT_OQ);
    *highest = _mm256_blendv_ps(*highest, x, higher);
    *where = _mm256_blendv_epi8(*where, number, _mm256_castps_si256(higher));
}
/* x y + z */
static inline Floats fma_floats(Floats x, Floats y, Floats z) { return _mm256_fmadd_ps(x, y, z); }
static inline float sum_floats(Floats x) {
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
/* x - floor(x) */
static inline Floats above_floor(Floats x) { return _mm256_sub_ps(x, _mm256_floor_ps(x)); }
/* x 2^floor(n), or almost 0 for n below -100. x is in [2^-20, 2^24). */
static inline Floats scale_floats(Floats x, Floats n) {
    Floats floor = _mm256_floor_ps(_mm256_max_ps(n, _mm256_set1_ps(-100)));
    __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(floor), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), exponent));
}
/* x, with the numbers of each pair exchanged */
static inline Ints swap_pairs(Ints x) { return _mm256_shuffle_epi32(x, 0xb1); }

/* Return 2 LANES whole numbers of [0, 2^16), as 16-bit numbers less 2^15, in the order of `packed_key`. */
static inline Ints pack_16(Floats x, Floats y) {
    Ints both = _mm256_packus_epi32(_mm256_cvtps_epi32(x), _mm256_cvtps_epi32(y));
    return _mm256_xor_si256(both, _mm256_set1_epi16((int16_t)0x8000));
}
/* Return which of 2 LANES numbers is at a place: the instruction interleaves its operands by four numbers. */
static inline int64_t packed_key(int64_t place) { return place / 4 % 2 * LANES + place / 8 * 4 + place % 4; }

#if defined(__AVXVNNI__)
#define VNNI
static inline Ints add_products_8(Ints sums, Ints x, Ints y) {
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(x), "x"(y));
    return sums;
}
static inline Ints add_products_16(Ints sums, Ints x, Ints y) {
    __asm__("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sums) : "x"(x), "x"(y));
    return sums;
}
#else
static inline Ints add_products_16(Ints sums, Ints x, Ints y) {
    return _mm256_add_epi32(sums, _mm256_madd_epi16(x, y));
}
#endif
#endif

#endif
