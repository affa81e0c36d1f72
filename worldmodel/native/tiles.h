/* Products on the processor's matrix unit (AMX): bfloat16 tiles, sums in float32, float32's exactness.
 *
 * A float32 is the sum of three bfloat16 numbers, and a product of two bfloat16 numbers is exact in float32. So where
 * weights are bfloat16 numbers, three products of bfloat16 make one of float32, as exact; only the order of its sum is
 * another: 32 inputs at a time, the small parts first. It is the same for a row whatever rows are beside it. */
#ifndef WORLDMODEL_TILES_H
#define WORLDMODEL_TILES_H

#if defined(__AMX_TILE__)

#include <unistd.h>
#include <sys/syscall.h>

#include "vector.h"

/* The shapes of the unit's eight tiles. */
typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} Tiles;

/* Whether the system lets this process use the unit; asks for it. */
INLINE int tiles_usable(void)
{
    enum { PERMIT = 0x1023, TILE_DATA = 18 };
    return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
           __builtin_cpu_supports("avx512bf16") && !syscall(SYS_arch_prctl, PERMIT, TILE_DATA);
}

/* Tiles 0 to 5, of sums and of x, get so many rows of 64 bytes, 6 and 7, of weights, 16. */
INLINE void tiles_shape(int rows)
{
    Tiles all = {.palette = 1};
    for (int i = 0; i < 8; i++) all.bytes[i] = 64, all.rows[i] = i < 6 ? rows : 16;
    __asm__ volatile("" : : "r"(&all) : "memory"); /* gcc believes that only its first bytes are read */
    _tile_loadconfig(&all);
}

/* Around everything that a thread does with tiles; another's shapes are kept, not contents. */
static __attribute__((unused)) void tiles_begin(Tiles *before)
{
    _tile_storeconfig(before);
    __asm__ volatile("" : : "r"(before) : "memory");
    tiles_shape(16);
}

static __attribute__((unused)) void tiles_end(const Tiles *before)
{
    __asm__ volatile("" : : "r"(before) : "memory");
    if (before->palette) _tile_loadconfig(before);
    else _tile_release();
}

enum {
    BLOCK = 32,         /* inputs of a tile: 16 rows of them, or 16 pairs of 16 outputs */
    SLICES = 3,         /* bfloat16 numbers that make a float32 */
    TILE = 16 * BLOCK,  /* numbers of a tile */
    TILED_ROWS = 64     /* rows of x at a time, so that their slices stay in the cache */
};

/* A vector's bfloat16 numbers nearest to v, and what they leave of it. */
INLINE __m512i slice(vec *v)
{
    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)v[1], (__m512)v[0]);
    const __m512i bits = (__m512i)both;
    v[0] -= (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(bits)), 16);
    v[1] -= (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(bits, 1)), 16);
    return bits;
}

/* The slices of x (rows, inputs): (groups of 16 rows, blocks, SLICES, 16, BLOCK). */
INLINE void slices(const float *x, ptrdiff_t ldx, int rows, int inputs, uint16_t *a)
{
    const int blocks = (inputs + BLOCK - 1) / BLOCK;
    for (int r = 0; r < rows; r++, x += ldx)
        for (int b = 0; b < blocks; b++) {
            const int left = inputs - b * BLOCK;
            vec v[2];
            if (left >= BLOCK) v[0] = load(x + b * BLOCK), v[1] = load(x + b * BLOCK + LANES);
            else
                for (int i = 0; i < 2; i++) {
                    const int n = left - i * LANES;
                    const __mmask16 some = n <= 0 ? 0 : n >= LANES ? 0xffff : (1u << n) - 1;
                    v[i] = (vec)_mm512_maskz_loadu_ps(some, x + b * BLOCK + i * LANES);
                }
            uint16_t *to = a + ((ptrdiff_t)(r / 16) * blocks + b) * SLICES * TILE + r % 16 * BLOCK;
            UNROLL for (int s = 0; s < SLICES; s++) _mm512_store_si512(to + s * TILE, slice(v));
        }
}

/* Asks for the block behind this one, which the processor itself does not foresee across tiles. */
INLINE void tiles_fetch(const uint16_t *weight)
{
    UNROLL for (int i = 2 * TILE; i < 4 * TILE; i += 32) __builtin_prefetch(weight + i);
}

/* Every few blocks stores a tile for nobody: a store that comes 0.7 us or more after the last one takes 0.3 us longer (on a
 * Granite Rapids), and the next products wait for it. */
INLINE void tiles_stir(int block)
{
    uint16_t nowhere[TILE] __attribute__((aligned(64)));
    if (block % 4 == 3) _tile_stored(4, nowhere, 64);
}

/* What the vector units do while the matrix unit multiplies: a little after every few products, `SLICES` times a block. */
typedef struct {
    void (*some)(void *of);
    void *of;
} Meanwhile;

/* Sums of 32 rows and a panel of outputs: tiles 0 to 3. */
INLINE void sums_zero(void)
{
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

/* Adds the products of `count` slices, each `step` behind the other, of 32 rows, of which the second 16 lie `second`
 * further, with blocks of a panel's weights (blocks, 2, TILE); `done` blocks were added before. */
INLINE void sums_add(int count, const uint16_t *a, ptrdiff_t step, ptrdiff_t second, const uint16_t *weight, int blocks,
                     int done, Meanwhile meanwhile)
{
    for (int b = 0; b < blocks; b++, a += count * step, weight += 2 * TILE) {
        tiles_fetch(weight);
        _tile_loadd(6, weight, 64);
        _tile_loadd(7, weight + TILE, 64);
        UNROLL for (int s = count - 1; s >= 0; s--) {
            _tile_loadd(4, a + s * step, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, a + s * step + second, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
            if (meanwhile.some) meanwhile.some(meanwhile.of);
        }
        tiles_stir(done + b);
    }
}

/* As `sums_add`, of up to 16 rows with two panels. */
INLINE void sums_add_few(const uint16_t *a, const uint16_t *weight, int blocks, Meanwhile meanwhile)
{
    const uint16_t *other = weight + (ptrdiff_t)blocks * 2 * TILE;
    for (int b = 0; b < blocks; b++, a += SLICES * TILE, weight += 2 * TILE, other += 2 * TILE) {
        _tile_loadd(6, weight, 64);
        _tile_loadd(7, weight + TILE, 64);
        for (int s = SLICES - 1; s >= 0; s--) {
            _tile_loadd(4, a + s * TILE, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            meanwhile.some(meanwhile.of);
        }
        _tile_loadd(6, other, 64);
        _tile_loadd(7, other + TILE, 64);
        for (int s = SLICES - 1; s >= 0; s--) {
            _tile_loadd(4, a + s * TILE, 64);
            _tile_dpbf16ps(2, 4, 6);
            _tile_dpbf16ps(3, 4, 7);
        }
        tiles_stir(b);
    }
}

/* Tiles 0 and 1 side by side to c, 2 and 3 to d; `ld` floats a row. */
INLINE void sums_store(float *c, float *d, ptrdiff_t ld)
{
    _tile_stored(0, c, 4 * ld);
    _tile_stored(1, c + 16, 4 * ld);
    _tile_stored(2, d, 4 * ld);
    _tile_stored(3, d + 16, 4 * ld);
}

#else

/* Other builds have no tiles. */
typedef struct {
    int none;
} Tiles;

static inline void tiles_begin(Tiles *before) { before->none = 0; }
static inline void tiles_end(const Tiles *before) { (void)before; }

#endif
#endif
