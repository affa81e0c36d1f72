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

#define TILE(ROWS, PANELS)                                                                            \
    do {                                                                                              \
        if (map->half) tile(ROWS, PANELS, 1, map, panel, x, ldx, y, ldy, kind);                       \
        else tile(ROWS, PANELS, 0, map, panel, x, ldx, y, ldy, kind);                                 \
    } while (0)

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
    for (int panel = 0; panel < panels; panel++) {
        const float *const first = x;
        float *const result = y;
        int left = rows;
        while (left) {
            int n;
            if (left >= TILE_ROWS) n = TILE_ROWS;
            else if (left >= 8 && TILE_ROWS > 8) n = 8;
            else n = left < 6 ? left : 6;
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
            x += n * ldx;
            y += n * ldy;
            left -= n;
        }
        x = first;
        y = result;
    }
}

#endif
