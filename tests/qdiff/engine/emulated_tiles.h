/* The matrix tiles of AMX in plain C, so that attention_tiles.c can be tested on CPUs that have AVX-512 and bfloat16 but
 * no tiles: `make test-isa` includes this file before each source. A tile has 16 rows of 64 bytes. */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static __thread uint8_t emulated[8][16][64];

#define syscall(...) 0 /* the kernel grants tiles */
#undef _tile_loadconfig
#undef _tile_storeconfig
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbuud
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) (void)(config)
#define _tile_storeconfig(config) (void)(config)
#define _tile_zero(tile) memset(emulated[tile], 0, sizeof emulated[tile])
#define _tile_loadd(tile, from, stride) emulated_load(tile, from, stride)
#define _tile_stored(tile, to, stride) emulated_store(tile, to, stride)
#define _tile_dpbuud(sums, x, y) emulated_bytes(sums, x, y)
#define _tile_dpbf16ps(sums, x, y) emulated_bfloat16(sums, x, y)
#define EMULATED static inline __attribute__((unused))

EMULATED void emulated_load(int tile, const void *from, int64_t stride) {
    for (int row = 0; row < 16; row++) memcpy(emulated[tile][row], (const uint8_t *)from + row * stride, 64);
}

EMULATED void emulated_store(int tile, void *to, int64_t stride) {
    for (int row = 0; row < 16; row++) memcpy((uint8_t *)to + row * stride, emulated[tile][row], 64);
}

/* Add x y to the sums: x [16, 64] and y [64, 16] in bytes, four rows of y side by side. */
EMULATED void emulated_bytes(int sums, int x, int y) {
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) {
            uint32_t sum;
            memcpy(&sum, &emulated[sums][i][4 * j], 4);
            for (int k = 0; k < 64; k++) sum += (uint32_t)emulated[x][i][k] * emulated[y][k / 4][4 * j + k % 4];
            memcpy(&emulated[sums][i][4 * j], &sum, 4);
        }
}

EMULATED float emulated_number(const uint8_t *from) {
    uint8_t bytes[4] = {0, 0, from[0], from[1]};
    float number;
    memcpy(&number, bytes, 4);
    return number;
}

/* Add x y to the sums: x [16, 32] and y [32, 16] in bfloat16, two rows of y side by side. */
EMULATED void emulated_bfloat16(int sums, int x, int y) {
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) {
            float sum;
            memcpy(&sum, &emulated[sums][i][4 * j], 4);
            for (int k = 0; k < 32; k++)
                sum += emulated_number(&emulated[x][i][2 * k]) *
                       emulated_number(&emulated[y][k / 2][4 * j + k % 2 * 2]);
            memcpy(&emulated[sums][i][4 * j], &sum, 4);
        }
}
