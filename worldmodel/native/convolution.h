/* Convolutions of the small convolutional codec (worldmodel/codec/conv.py): see decoder.c and encoder.c.
 *
 * Pictures lie channels last, channels padded with zeros to a multiple of PANEL. 3x3 convolutions are
 * Winograd's: F(2x2, 3x3) makes a tile of 2x2 pixels from 16 products in place of 36, F(4x4, 3x3) one of 4x4
 * from 36 in place of 144; a product's rows are all tiles. A matrix unit is faster still without. A picture's result
 * is the same, bit for bit, whatever pictures are beside it. */
#ifndef WORLDMODEL_CONVOLUTION_H
#define WORLDMODEL_CONVOLUTION_H

#include <stdlib.h>
#include <string.h>

#include "linear.h"
#include "threads.h"

#define GROUPS 8 /* of a GroupNorm */
#define EPSILON 1e-5f
#define PIXEL_SCALE 128.0f
#define TOGETHER 4           /* pictures that share a pass over the weights, at most, */
#define PIXELS_TOGETHER 1024 /* and their pixels */
#define LEVELS 8

/* A 3x3 convolution with zeros around the picture, by F(side x side, 3x3), side 2 or 4: weights G g G^T,
 * zeros behind the last output, (panels, (side + 2)^2, inputs, PANEL); bias (panels * PANEL). Side 0: on the
 * matrix unit, weights (panels, 9) of what a TILED linear map has of a panel, and of each activation so many
 * `slices`: 3 are all of it, 2 leave an error of 2^-18 of it, as much as Winograd's sums lose. */
typedef struct {
    const void *weight;
    const float *bias;
    int32_t inputs, outputs, side, slices;
} Convolution;

/* x + second(silu(first(silu(norm(x))))); the norm's gain and offset, zeros behind the last channel. */
typedef struct {
    const float *gain, *offset;
    Convolution first, second;
} Residual;

/* `count` pictures of h x w pixels, `pixel` elements each; pixel (0, 0) of the first is at `data`. */
typedef struct {
    float *data;
    ptrdiff_t pixel, row, picture;
    int count, h, w;
} Pictures;

/* The buffers of a level: its pictures, and two of activations with zeros around. */
typedef struct {
    Pictures x, a, b;
} Buffers;

/* What is added to PIXELS: element o of a pixel gets element o % period of the background's. */
typedef struct {
    const float *data;
    int period;
} Background;

enum { PIXELS = ADD + 1 };

/* Pixels behind the last that `convolve_tiled` reads, of rows of so many. */
#define SPARE(WIDTH) (2 * (WIDTH) + 2 + 32)

/* Pixels of whole tiles, of either side, that cover n. */
INLINE int whole(int n) { return (n + 3) / 4 * 4; }
/* Tiles that cover h x w pixels. */
INLINE int tiles(int side, int h, int w) { return ((h + side - 1) / side) * ((w + side - 1) / side); }
INLINE int smaller(int a, int b) { return a < b ? a : b; }
INLINE ptrdiff_t larger(ptrdiff_t a, ptrdiff_t b) { return a > b ? a : b; }
INLINE ptrdiff_t place(const Pictures *x, int p, int i, int j)
{
    return p * x->picture + i * x->row + j * x->pixel;
}

INLINE void store_bytes(uint8_t *p, vec v)
{
    typedef uint8_t bytes __attribute__((vector_size(LANES)));
    const vec magic = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer, half to even */
    v = (minimum(maximum(v, splat(0.0f)), splat(255.0f)) + magic) - magic;
    bytes b = __builtin_convertvector(__builtin_convertvector(v, ivec), bytes);
    memcpy(p, &b, LANES);
}

/* A vector of a convolution's result, from output o of a pixel on, to its place in y; PIXELS: y is of
 * bytes. */
INLINE void emit(int kind, const Pictures *y, int p, int i, int j, int o, vec v, Background under)
{
    const ptrdiff_t at = place(y, p, i, j) + o;
    if (kind == SILU) v = silu(v);
    if (kind == ADD) v += load(y->data + at);
    if (kind == PIXELS) {
        const float *pixel = under.data + (i * y->w + j) * (ptrdiff_t)(under.period + LANES);
        store_bytes((uint8_t *)y->data + at, v * PIXEL_SCALE + load(pixel + o % under.period));
    } else store(y->data + at, v);
}

/* ---- 3x3 convolutions ---------------------------------------------------------------------------------- */

/* B^T of F(2, 3), points 0, 1, -1, infinity, or F(4, 3), points 0, 3/4, -3/4, 3/2, -3/2, infinity: these lose
 * half as much to rounding as 0, 1, -1, 2, -2, infinity. */
INLINE void inputs(int side, const vec *d, vec *v)
{
    if (side == 2) {
        v[0] = d[2] - d[0], v[1] = d[2] + d[1], v[2] = d[2] - d[1], v[3] = d[3] - d[1];
        return;
    }
    const vec even_a = d[4] - 2.25f * d[2], odd_a = 0.75f * d[3] - 1.6875f * d[1];
    const vec even_b = d[4] - 0.5625f * d[2], odd_b = 1.5f * d[3] - 0.84375f * d[1];
    v[0] = 1.265625f * d[0] + (d[4] - 2.8125f * d[2]);
    v[1] = even_a + odd_a, v[2] = even_a - odd_a;
    v[3] = even_b + odd_b, v[4] = even_b - odd_b;
    v[5] = 1.265625f * d[1] + (d[5] - 2.8125f * d[3]);
}

/* A^T of the same. */
INLINE void outputs(int side, const vec *m, vec *y)
{
    const vec sum_a = m[1] + m[2], difference_a = m[1] - m[2];
    y[0] = m[0] + sum_a;
    if (side == 2) {
        y[1] = difference_a + m[3];
        return;
    }
    const vec sum_b = m[3] + m[4], difference_b = m[3] - m[4];
    y[0] += sum_b;
    y[1] = 0.75f * difference_a + 1.5f * difference_b;
    y[2] = 0.5625f * sum_a + 2.25f * sum_b;
    y[3] = 0.421875f * difference_a + (3.375f * difference_b + m[5]);
}

/* B^T d B of every tile of x: (points, tiles, channels), `step` floats a point. */
INLINE void spread(int side, const Pictures *x, float *v, ptrdiff_t step)
{
    for (int p = 0; p < x->count; p++)
        for (int i = 0; i < x->h; i += side)
            for (int j = 0; j < x->w; j += side, v += x->pixel)
                for (int c = 0; c < x->pixel; c += LANES) {
                    const float *from = x->data + place(x, p, i - 1, j - 1) + c;
                    vec columns[6][6], in[6], out[6];
                    UNROLL for (int l = 0; l < side + 2; l++) {
                        const float *top = from + l * x->pixel;
                        UNROLL for (int k = 0; k < side + 2; k++) in[k] = load(top + k * x->row);
                        inputs(side, in, columns[l]);
                    }
                    UNROLL for (int k = 0; k < side + 2; k++) {
                        UNROLL for (int l = 0; l < side + 2; l++) in[l] = columns[l][k];
                        inputs(side, in, out);
                        float *to = v + k * (side + 2) * step + c;
                        UNROLL for (int l = 0; l < side + 2; l++) store(to + l * step, out[l]);
                    }
                }
}

/* A^T m A of every tile of one panel's products m (points, tiles, PANEL) to that panel of y. */
INLINE void collect(int side, int kind, const float *m, ptrdiff_t step, const float *bias, const Pictures *y,
                    int panel, Background under)
{
    for (int p = 0; p < y->count; p++)
        for (int i = 0; i < y->h; i += side)
            for (int j = 0; j < y->w; j += side, m += PANEL)
                for (int c = 0; c < PANEL; c += LANES) {
                    const int o = panel * PANEL + c;
                    vec columns[6][4], in[6], out[4];
                    UNROLL for (int l = 0; l < side + 2; l++) {
                        const float *from = m + l * step + c;
                        UNROLL for (int k = 0; k < side + 2; k++) in[k] = load(from + k * (side + 2) * step);
                        outputs(side, in, columns[l]);
                    }
                    UNROLL for (int k = 0; k < side; k++) {
                        UNROLL for (int l = 0; l < side + 2; l++) in[l] = columns[l][k];
                        outputs(side, in, out);
                        UNROLL for (int l = 0; l < side; l++)
                            if (i + k < y->h && j + l < y->w)
                                emit(kind, y, p, i + k, j + l, o, out[l] + load(bias + o), under);
                    }
                }
}

/* y from x, which has zeros around, by F(side x side, 3x3); `kind`: what is done to it on its way. */
INLINE void winograd(int side, int kind, const Convolution *map, const Pictures *x, const Pictures *y,
                     Background under, float *work)
{
    const int rows = x->count * tiles(side, x->h, x->w), points = (side + 2) * (side + 2);
    const ptrdiff_t size = (ptrdiff_t)map->inputs * PANEL;
    /* LANES more: points at multiples of 4 kB would contend for the same lines of the cache */
    const ptrdiff_t step = rows * x->pixel + LANES, result = rows * PANEL + LANES;
    float *m = work + points * step;
    spread(side, x, work, step);
    for (int panel = 0; panel < padded(map->outputs) / PANEL; panel++) {
        for (int k = 0; k < points; k++) {
            const float *weight = (const float *)map->weight + (panel * points + k) * size;
            const Linear point = {.weight = weight, .inputs = map->inputs, .outputs = PANEL};
            linear(&point, rows, work + k * step, x->pixel, m + k * result, PANEL, PLAIN);
        }
        collect(side, kind, m, result, map->bias, y, panel, under);
    }
}

#if defined(__AMX_TILE__)
/* As `winograd`. Pictures with their zeros are one row of pixels, in which each of the nine weights meets a
 * pixel at a constant distance; what comes out where zeros were is dropped. */
INLINE void convolve_tiled(int kind, int count, const Convolution *map, const Pictures *x, const Pictures *y,
                           Background under, float *work)
{
    const int blocks = x->pixel / BLOCK, width = x->row / x->pixel, panels = padded(map->outputs) / PANEL;
    const int all = x->count * (x->picture / x->pixel), last = (x->h - 1) * width + x->w;
    const ptrdiff_t step = (ptrdiff_t)(all + SPARE(width)) * BLOCK; /* a slice of a block of all pixels */
    const float *from = x->data - x->row - x->pixel;
    uint16_t *const a = (uint16_t *)work;
    float c[32 * PANEL] __attribute__((aligned(64)));
    for (int i = 0; i < all; i++)
        for (int b = 0; b < blocks; b++, from += BLOCK) {
            vec v[2] = {load(from), load(from + LANES)};
            uint16_t *to = a + b * count * step + (ptrdiff_t)i * BLOCK;
            UNROLL for (int s = 0; s < count; s++) _mm512_store_si512(to + s * step, slice(v));
        }
    for (int panel = 0; panel < panels; panel++) {
        const uint16_t *weight = (const uint16_t *)map->weight + (ptrdiff_t)panel * 9 * blocks * 2 * TILE;
        const float *bias = map->bias + panel * PANEL;
        for (int p = 0; p < x->count; p++)
            for (int begin = 0; begin < last; begin += 32) {
                sums_zero();
                for (int k = 0; k < 9; k++)
                    sums_add(count,
                             a + (p * (x->picture / x->pixel) + begin + k / 3 * width + k % 3) * (ptrdiff_t)BLOCK,
                             step, 16 * BLOCK, weight + (ptrdiff_t)k * blocks * 2 * TILE, blocks, k * blocks,
                             (Meanwhile){NULL, NULL});
                sums_store(c, c + 16 * PANEL, PANEL);
                for (int r = 0, i = begin / width, j = begin % width; r < 32 && i < x->h; r++, j++) {
                    if (j == width) i++, j = 0;
                    if (i >= x->h || j >= x->w) continue;
                    for (int o = 0; o < PANEL; o += LANES)
                        emit(kind, y, p, i, j, panel * PANEL + o, load(c + r * PANEL + o) + load(bias + o), under);
                }
            }
    }
}
#define CONVOLVE_TILED(KIND)                                                                          \
    if (map->side == 0 && map->slices == 2) convolve_tiled(KIND, 2, map, x, y, under, work);          \
    else if (map->side == 0) convolve_tiled(KIND, 3, map, x, y, under, work);                         \
    else
#else
#define CONVOLVE_TILED(KIND)
#endif

#define CONVOLVE(NAME, KIND)                                                                          \
    static __attribute__((unused)) void NAME(const Convolution *map, const Pictures *x, const Pictures *y, Background under,  \
                     float *work)                                                                     \
    {                                                                                                 \
        CONVOLVE_TILED(KIND)                                                                          \
        if (map->side == 4) winograd(4, KIND, map, x, y, under, work);                                \
        else winograd(2, KIND, map, x, y, under, work);                                               \
    }
CONVOLVE(convolve, PLAIN)
CONVOLVE(convolve_silu, SILU)
CONVOLVE(convolve_add, ADD)
CONVOLVE(convolve_pixels, PIXELS)

/* Floats that these work in. */
static __attribute__((unused)) ptrdiff_t work_size(const Convolution *map, const Pictures *x)
{
    if (map->side == 0) return (x->count * x->picture + SPARE(x->row / x->pixel) * x->pixel) / 2 * map->slices;
    const ptrdiff_t rows = x->count * tiles(map->side, x->h, x->w);
    const int points = (map->side + 2) * (map->side + 2);
    return points * (rows * (x->pixel + PANEL) + 2 * LANES);
}

/* ---- between convolutions ------------------------------------------------------------------------------ */

/* A channel's sum over one picture's pixels of x, or of (x - mean)^2. */
INLINE vec total(const Pictures *x, const float *from, int squares, vec mean)
{
    vec sums[4] = {{0}};
    const int pixels = x->h * x->w;
    int i = 0;
    for (; i + 4 <= pixels; i += 4)
        UNROLL for (int k = 0; k < 4; k++) {
            vec v = load(from + (i + k) * x->pixel) - mean;
            sums[k] += squares ? v * v : v;
        }
    for (; i < pixels; i++) {
        vec v = load(from + i * x->pixel) - mean;
        sums[0] += squares ? v * v : v;
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

/* Every channel's mean over its group, from sums over its pixels. */
static __attribute__((unused)) void group_means(float *sums, int channels, int pixels)
{
    const int size = channels / GROUPS;
    for (float *group = sums; group < sums + channels; group += size) {
        float all = 0.0f;
        for (int c = 0; c < size; c++) all += group[c];
        for (int c = 0; c < size; c++) group[c] = all / ((float)size * pixels);
    }
}

/* y = silu(x), of x normalised first where `block`; work: 2 floats a channel. */
static __attribute__((unused)) void activate(const Pictures *x, const Pictures *y, const Residual *block, int channels, float *work)
{
    float *scale = work, *mean = work + x->pixel;
    for (int p = 0; p < x->count; p++) {
        const float *from = x->data + p * x->picture;
        if (block) {
            for (int c = 0; c < x->pixel; c += LANES) store(mean + c, total(x, from + c, 0, (vec){0}));
            group_means(mean, channels, x->h * x->w);
            for (int c = 0; c < x->pixel; c += LANES) store(scale + c, total(x, from + c, 1, load(mean + c)));
            group_means(scale, channels, x->h * x->w);
            for (int c = 0; c < channels; c++)
                scale[c] = block->gain[c] / __builtin_sqrtf(scale[c] + EPSILON);
        }
        for (int i = 0; i < x->h; i++)
            for (int j = 0; j < x->w; j++, from += x->pixel)
                for (int c = 0; c < x->pixel; c += LANES) {
                    vec v = load(from + c);
                    if (block) v = (v - load(mean + c)) * load(scale + c) + load(block->offset + c);
                    store(y->data + place(y, p, i, j) + c, silu(v));
                }
    }
}

/* The first `count` pictures of a buffer. */
INLINE Pictures first(Pictures x, int count)
{
    x.count = count;
    return x;
}

/* Lays out a buffer in `memory`, behind the `used` floats of it, or with NULL only counts; `margin` 1:
 * pixels of zeros around, or 0. */
static __attribute__((unused)) void reserve(Pictures *x, int count, int h, int w, int pixel, int margin, float *memory,
                    ptrdiff_t *used)
{
    const ptrdiff_t row = (ptrdiff_t)pixel * (margin ? whole(w) + 2 : w);
    const ptrdiff_t picture = row * (margin ? whole(h) + 2 : h);
    float *const data = memory ? memory + *used + margin * (row + pixel) : NULL;
    *x = (Pictures){data, pixel, row, picture, count, h, w};
    *used += count * picture;
    if (!memory || !margin) return;
    for (int p = 0; p < count; p++) {
        memset(data + place(x, p, -1, -1), 0, (row + pixel) * sizeof(float));
        for (int i = 0; i < h; i++) memset(data + place(x, p, i, w), 0, (row - w * pixel) * sizeof(float));
        memset(data + place(x, p, h, 0), 0, (picture - (h + 1) * row - pixel) * sizeof(float));
    }
}

#endif
