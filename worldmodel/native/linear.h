/* Matrix products of packed weights: y = x W^T + b with few or many rows. See vector.h about rounding. */
#ifndef WORLDMODEL_LINEAR_H
#define WORLDMODEL_LINEAR_H

#include "vector.h"

/* A linear map from `inputs` to `outputs`. Weights lie in panels of PANEL outputs, zeros behind the last:
 * (panels, inputs, PANEL), float16 where `half`, else float32. bias (panels * PANEL) or NULL. */
typedef struct {
    const void *weight;
    const float *bias;
    int32_t inputs, outputs, half;
} Linear;

enum { PLAIN, GELU, SILU, ADD };

INLINE int padded(int n) { return (n + PANEL - 1) / PANEL * PANEL; }

/* `rows` x (`panels` * PANEL) of y; rows and panels are constants. */
INLINE void tile(int rows, int panels, int half, const Linear *map, int panel, const float *x, ptrdiff_t ldx,
                 float *y, ptrdiff_t ldy, int kind)
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
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < 2 * panels; c++) {
            ptrdiff_t at = (ptrdiff_t)panel * PANEL + c * LANES;
            vec v = sums[r][c];
            if (map->bias) v += load(map->bias + at);
            if (kind == GELU) v = gelu(v);
            if (kind == SILU) v = silu(v);
            if (kind == ADD) v += load(y + r * ldy + at);
            store(y + r * ldy + at, v);
        }
}

enum { MANY_ROWS = 32, MOST_INPUTS = 2048 }; /* where a panel of halves is worth converting once, on the stack */

#define TILE(ROWS, PANELS)                                                                            \
    do {                                                                                              \
        if (map->half) tile(ROWS, PANELS, 1, map, panel, x, ldx, y, ldy, kind);                       \
        else tile(ROWS, PANELS, 0, map, panel, x, ldx, y, ldy, kind);                                 \
    } while (0)

/* One panel of y for all rows. */
INLINE void rows_of(const Linear *map, int panel, int rows, const float *x, ptrdiff_t ldx, float *y, ptrdiff_t ldy, int kind)
{
    for (int n; rows; x += n * ldx, y += n * ldy, rows -= n) {
        if (rows >= TILE_ROWS) n = TILE_ROWS;
        else if (TILE_ROWS > 8 && rows >= 8) n = 8;
        else n = rows < 6 ? rows : 6;
        switch (n) {
        case TILE_ROWS: TILE(TILE_ROWS, 1); break;
#if TILE_ROWS > 8
        case 8: TILE(8, 1); break;
        case 6: TILE(6, 1); break;
#endif
        case 5: TILE(5, 1); break;
        case 4: TILE(4, 1); break;
        case 3: TILE(3, 1); break;
        case 2: TILE(2, 1); break;
        default: TILE(1, 1); break;
        }
    }
}

/* The same from weights in float16, converted first. */
static __attribute__((noinline)) void converted(const Linear *map, int panel, int rows, const float *x, ptrdiff_t ldx,
                                                float *y, ptrdiff_t ldy, int kind)
{
    const int size = map->inputs * PANEL, column = panel * PANEL;
    float weight[size] __attribute__((aligned(64)));
    const uint16_t *half = (const uint16_t *)map->weight + (ptrdiff_t)panel * size;
    for (int i = 0; i < size; i += LANES) store(weight + i, load_half(half + i));
    const Linear one = {weight, map->bias ? map->bias + column : NULL, map->inputs, PANEL, 0};
    rows_of(&one, 0, rows, x, ldx, y + column, ldy, kind);
}

/* y (rows, padded outputs) from x (rows, inputs); leading dimensions ldx, ldy. `kind`: what is done to it on its way. */
static __attribute__((noinline)) void linear(const Linear *map, int rows, const float *x, ptrdiff_t ldx, float *y,
                                             ptrdiff_t ldy, int kind)
{
    const int panels = padded(map->outputs) / PANEL;
    if (rows <= 3) { /* bound by reading weights: two panels at a time keep enough sums under way */
        int panel = 0;
        for (; panel + 2 <= panels; panel += 2)
            if (rows == 1) TILE(1, 2);
            else if (rows == 2) TILE(2, 2);
            else TILE(3, 2);
        for (; panel < panels; panel++)
            if (rows == 1) TILE(1, 1);
            else if (rows == 2) TILE(2, 1);
            else TILE(3, 1);
        return;
    }
    for (int panel = 0; panel < panels; panel++)
        if (map->half && rows >= MANY_ROWS && map->inputs <= MOST_INPUTS) converted(map, panel, rows, x, ldx, y, ldy, kind);
        else rows_of(map, panel, rows, x, ldx, y, ldy, kind);
}

#endif
