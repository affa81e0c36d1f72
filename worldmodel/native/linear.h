/* Matrix products of packed weights: y = x W^T + b with few or many rows. See vector.h about rounding. */
#ifndef WORLDMODEL_LINEAR_H
#define WORLDMODEL_LINEAR_H

#include "tiles.h"
#include "vector.h"

/* How weights are stored: TILED are bfloat16 as tiles.h reads them. */
enum { FLOAT32, FLOAT16, TILED };

/* A linear map from `inputs` to `outputs`. Weights lie in panels of PANEL outputs, zeros behind the last:
 * (panels, inputs, PANEL), or TILED with zeros behind the last input (panels, inputs / 32, 2, 16, 16, 2): of each block
 * of inputs two halves of the panel, of each 16 pairs of inputs, of each 16 outputs. bias (panels * PANEL) or NULL. */
typedef struct {
    const void *weight;
    const float *bias;
    int32_t inputs, outputs, stored;
} Linear;

enum { PLAIN, GELU, SILU, ADD };

INLINE int padded(int n) { return (n + PANEL - 1) / PANEL * PANEL; }

/* `rows` x (`panels` * PANEL) of y; rows, panels and half are constants. */
INLINE void tile(int rows, int panels, int half, const Linear *map, int panel, const float *x, ptrdiff_t ldx,
                 float *y, ptrdiff_t ldy, int add)
{
    const int k = map->inputs;
    const ptrdiff_t stride = (ptrdiff_t)k * PANEL;
    const float *w = (const float *)map->weight + panel * stride;
    const uint16_t *h = (const uint16_t *)map->weight + panel * stride;
    vec sums[TILE_ROWS][4];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < 2 * panels; c++) sums[r][c] = (vec){0};
    for (int i = 0; i < k; i++) {
        vec column[4];
        UNROLL for (int c = 0; c < 2 * panels; c++) {
            ptrdiff_t at = (c / 2) * stride + (ptrdiff_t)i * PANEL + (c % 2) * LANES;
            column[c] = half ? load_half(h + at) : load(w + at);
        }
        UNROLL for (int r = 0; r < rows; r++) {
            vec value = splat(x[r * ldx + i]);
            UNROLL for (int c = 0; c < 2 * panels; c++) sums[r][c] += value * column[c];
        }
    }
    UNROLL for (int c = 0; c < 2 * panels; c++) {
        const ptrdiff_t at = (ptrdiff_t)panel * PANEL + c * LANES;
        const vec bias = map->bias ? load(map->bias + at) : splat(0.0f);
        UNROLL for (int r = 0; r < rows; r++) {
            vec v = sums[r][c] + bias;
            if (add) v += load(y + r * ldy + at);
            store(y + r * ldy + at, v);
        }
    }
}

/* A function for each number of rows, so that they are compiled once. */
#define TILES(ROWS, PANELS)                                                                                          \
    static __attribute__((noinline, unused)) void tile_##ROWS##_##PANELS(                                            \
        const Linear *map, int panel, const float *x, ptrdiff_t ldx, float *y, ptrdiff_t ldy, int add)               \
    {                                                                                                                \
        if (map->stored == FLOAT16) tile(ROWS, PANELS, 1, map, panel, x, ldx, y, ldy, add);                          \
        else tile(ROWS, PANELS, 0, map, panel, x, ldx, y, ldy, add);                                                 \
    }
TILES(1, 2)
TILES(2, 2)
TILES(3, 2)
TILES(1, 1)
TILES(2, 1)
TILES(3, 1)
TILES(4, 1)
TILES(5, 1)
TILES(6, 1)
#if TILE_ROWS > 6
TILES(7, 1)
TILES(8, 1)
TILES(9, 1)
TILES(10, 1)
TILES(11, 1)
TILES(12, 1)
#endif

/* By number of rows. */
typedef void (*Tile)(const Linear *, int, const float *, ptrdiff_t, float *, ptrdiff_t, int);

static const Tile one_panel[] = {
    NULL,     tile_1_1, tile_2_1, tile_3_1, tile_4_1, tile_5_1, tile_6_1,
#if TILE_ROWS > 6
    tile_7_1, tile_8_1, tile_9_1, tile_10_1, tile_11_1, tile_12_1,
#endif
};
static const Tile two_panels[] = {NULL, tile_1_2, tile_2_2, tile_3_2};

static void activate_rows(int rows, int columns, float *y, ptrdiff_t ldy, int kind)
{
    for (int r = 0; r < rows; r++, y += ldy)
        for (int i = 0; i < columns; i += LANES) store(y + i, kind == GELU ? gelu(load(y + i)) : silu(load(y + i)));
}

enum { FEW_ROWS = 3, MANY_ROWS = 32, MOST_INPUTS = 2048 };

#if defined(__AMX_TILE__)
/* Products c (rows, width) on their way to y, some rows at a time. */
typedef struct {
    const float *c, *bias;
    float *y;
    ptrdiff_t ldy;
    int rows, width, some, kind;
} Emission;

INLINE void emit_some(void *of)
{
    Emission *e = of;
    for (int n = e->rows < e->some ? e->rows : e->some; n; n--, e->rows--, e->c += e->width, e->y += e->ldy)
        for (int i = 0; i < e->width; i += LANES) {
            vec v = load(e->c + i);
            if (e->bias) v += load(e->bias + i);
            if (e->kind == GELU) v = gelu(v);
            if (e->kind == SILU) v = silu(v);
            if (e->kind == ADD) v += load(e->y + i);
            store(e->y + i, v);
        }
}

/* As `linear`, of a TILED map. The products of one panel are emitted while those of the next are made. */
static __attribute__((noinline, unused)) void linear_tiled(const Linear *map, int rows, const float *x, ptrdiff_t ldx,
                                                           float *y, ptrdiff_t ldy, int kind)
{
    const int panels = padded(map->outputs) / PANEL, blocks = (map->inputs + BLOCK - 1) / BLOCK;
    const int most = rows < TILED_ROWS ? rows : TILED_ROWS, few = rows <= 16;
    const ptrdiff_t size = (ptrdiff_t)blocks * 2 * TILE, group = (ptrdiff_t)blocks * SLICES * TILE;
    uint16_t a[(most + 31) / 32 * 2 * group] __attribute__((aligned(64)));
    float c[2][32 * PANEL] __attribute__((aligned(64)));
    int turn = 0;
    if (few) tiles_shape(rows);
    for (int some; rows > 0; rows -= some, x += some * ldx, y += some * ldy) {
        Emission last = {0};
        const Meanwhile emission = {emit_some, &last};
        some = rows < TILED_ROWS ? rows : TILED_ROWS;
        slices(x, ldx, some, map->inputs, a);
        for (int panel = 0, wide; panel < panels; panel += wide) {
            const uint16_t *weight = (const uint16_t *)map->weight + panel * size;
            wide = few && panel + 2 <= panels ? 2 : 1;
            for (int row = 0; row < some; row += 32, turn = !turn) {
                float *const to = c[turn];
                sums_zero();
                if (wide == 2) sums_add_few(a, weight, blocks, emission);
                else sums_add(SLICES, a + row / 16 * group, TILE, group, weight, blocks, 0, emission);
                sums_store(to, to + (wide == 2 ? PANEL : 16 * PANEL), wide * PANEL);
                last = (Emission){to,
                                  map->bias ? map->bias + panel * PANEL : NULL,
                                  y + row * ldy + panel * PANEL,
                                  ldy,
                                  some - row < 32 ? some - row : 32,
                                  wide * PANEL,
                                  0,
                                  kind};
                last.some = (last.rows + SLICES * blocks - 1) / (SLICES * blocks);
            }
        }
        while (last.rows) emit_some(&last);
    }
    if (few) tiles_shape(16);
}
#endif

/* y (rows, padded outputs) from x (rows, inputs); leading dimensions ldx, ldy. `kind`: what is done to it on its way. */
static __attribute__((noinline, unused)) void linear(const Linear *map, int rows, const float *x, ptrdiff_t ldx, float *y,
                                                     ptrdiff_t ldy, int kind)
{
#if defined(__AMX_TILE__)
    if (map->stored == TILED) {
        linear_tiled(map, rows, x, ldx, y, ldy, kind);
        return;
    }
#endif
    const int panels = padded(map->outputs) / PANEL, size = map->inputs * PANEL;
    /* A panel of halves is worth converting once, on the stack, for many rows. */
    const int convert = map->stored == FLOAT16 && rows >= MANY_ROWS && map->inputs <= MOST_INPUTS;
    float converted[convert ? size : 1] __attribute__((aligned(64)));
    for (int panel = 0, wide; panel < panels; panel += wide) {
        /* Few rows are bound by reading weights: two panels at a time keep enough sums under way. */
        wide = rows <= FEW_ROWS && panel + 2 <= panels ? 2 : 1;
        Linear one = *map;
        int column = panel;
        if (convert) {
            const uint16_t *half = (const uint16_t *)map->weight + (ptrdiff_t)panel * size;
            for (int i = 0; i < size; i += LANES) store(converted + i, load_half(half + i));
            one = (Linear){converted, map->bias ? map->bias + panel * PANEL : NULL, map->inputs, PANEL, FLOAT32};
            column = 0;
        }
        const float *from = x;
        float *to = y + (ptrdiff_t)panel * PANEL;
        const ptrdiff_t back = (ptrdiff_t)column * PANEL; /* a tile adds its column itself */
        for (int left = rows, n; left > 0; left -= n, from += n * ldx, to += n * ldy) {
            n = left >= 2 * TILE_ROWS ? TILE_ROWS : left > TILE_ROWS ? (left + 1) / 2 : left; /* the last two are alike */
            (wide == 2 ? two_panels : one_panel)[n](&one, column, from, ldx, to - back, ldy, kind == ADD);
            if (kind == GELU || kind == SILU) activate_rows(n, wide * PANEL, to, ldy, kind);
        }
    }
}

#endif
