/* The layers of the flow's transformers on a CPU. The mathematics is that of worldmodel/flow (block.py, attention.py), which
 * computes the same with torch where this does not serve; worldmodel/flow/native.py says where it does, and mirrors the
 * structures here field by field.
 *
 * Axis letters: B rows (sequences), S streams (the same tokens under the action and under none), R tokens of a pass, N
 * tokens of a frame, D dimensions of a token, W width, H heads, K head width. Sequences do not depend on each other, bit
 * for bit, so threads share them out in any way. */
#ifndef WORLDMODEL_TRANSFORMER_H
#define WORLDMODEL_TRANSFORMER_H

#include "linear.h"
#include "threads.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    const float *attention_gain, *attention_bias, *mlp_gain, *mlp_bias; /* LayerNorms */
    Linear qkv, out, up, down;
} Layer;

typedef struct {
    const Layer *layer;
    const float *final_gain; /* of the RMSNorm at the end, NULL for none */
    Linear in, action, head; /* action.inputs 0: none */
    int32_t layers, width, heads, head_dim;
} Transformer;

/* Cached keys and values: (layers, 2, rows, H, tokens, K) with these strides, in floats; one stored row serves `fold`. */
typedef struct {
    float *kv;
    int64_t layer, kind, row, head;
    int32_t tokens, fold;
} Segment;

enum { FETCHED = 1024 }; /* floats at most: the processor itself goes on where memory is read in order */

/* Sequences with one past. New K/V go behind the last segment, whose fold is 1; with no segment they are not kept. turns:
 * (R, K / 2) unit complex numbers that rotate the run's queries and keys. fresh: the run begins with SOS. */
typedef struct {
    const Segment *segment;
    const float *turns;
    int32_t segments, rows, fresh;
} Cohort;

typedef struct {
    const Cohort *cohort;
    int row; /* within the cohort */
    int past; /* cached tokens */
} Sequence;

/* One thread's buffers for `rows` sequences. */
typedef struct {
    float *x, *normal, *wide, *mixed, *kv, *logits, *out;
    const float **keys, **values;
    Sequence *sequence;
    void *memory;
} Scratch;

static __attribute__((unused)) void sequences(const Cohort *cohort, int begin, int rows, Sequence *into)
{
    for (; rows; cohort++) {
        int past = 0;
        for (int s = 0; s < cohort->segments; s++) past += cohort->segment[s].tokens;
        for (; begin < cohort->rows && rows; begin++, rows--) *into++ = (Sequence){cohort, begin, past};
        begin -= cohort->rows;
        if (begin < 0) begin = 0;
    }
}

/* ---- scratch ---------------------------------------------------------------------------------------------------------- */
static __attribute__((unused)) int allocate(Scratch *s, const Transformer *t, int rows, int streams, int pass, int run, int past)
{
    const size_t m = (size_t)rows * streams * pass, width = padded(t->width);
    const size_t keys = (size_t)(past + run + LANES), heads = (size_t)t->heads * t->head_dim;
    size_t sizes[] = {m * width,
                      m * width,
                      m * (size_t)padded(4 * t->width),
                      m * width,
                      (size_t)t->layers * 2 * rows * streams * run * heads,
                      keys,
                      m * padded(t->head.outputs) + LANES,
                      2 * keys * sizeof(float *) / sizeof(float),
                      rows * sizeof(Sequence) / sizeof(float)};
    size_t total = 0, count = sizeof sizes / sizeof *sizes;
    for (size_t i = 0; i < count; i++) total += sizes[i] = (sizes[i] + 15) / 16 * 16;
    float *p = s->memory = aligned_alloc(64, total * sizeof(float));
    if (!p) return 1;
    float *part[sizeof sizes / sizeof *sizes];
    for (size_t i = 0; i < count; p += sizes[i++]) part[i] = p;
    s->x = part[0], s->normal = part[1], s->wide = part[2], s->mixed = part[3], s->kv = part[4], s->logits = part[5];
    s->out = part[6], s->keys = (const float **)part[7], s->values = s->keys + keys, s->sequence = (Sequence *)part[8];
    return 0;
}

/* ---- norms, rotations ----------------------------------------------------------------------------------------------------- */
static __attribute__((unused)) void layer_norm(const float *x, const float *gain, const float *bias, int width, int rows, ptrdiff_t ld, float *y)
{
    for (; rows; rows--, x += ld, y += ld) {
        vec total = {0}, square = {0};
        for (int i = 0; i < width; i += LANES) total += load(x + i);
        float mean = sum(total) / (float)width;
        for (int i = 0; i < width; i += LANES) {
            vec d = load(x + i) - mean;
            square += d * d;
        }
        float scale = 1.0f / sqrtf(sum(square) / (float)width + 1e-5f);
        for (int i = 0; i < width; i += LANES)
            store(y + i, (load(x + i) - mean) * scale * load(gain + i) + load(bias + i));
    }
}

static __attribute__((unused)) void rms_norm(const float *x, const float *gain, int width, float *y)
{
    vec square = {0};
    for (int i = 0; i < width; i += LANES) {
        vec v = load(x + i);
        square += v * v;
    }
    float scale = 1.0f / sqrtf(sum(square) / (float)width + 1e-6f);
    for (int i = 0; i < width; i += LANES) store(y + i, load(x + i) * scale * load(gain + i));
}

/* K adjacent pairs times K / 2 complex numbers, times a scale. */
INLINE void rotate(const float *x, const float *turn, int size, float scale, float *y)
{
    ivec lane;
    UNROLL for (int i = 0; i < LANES; i++) lane[i] = i;
    const vec sign = __builtin_convertvector(2 * (lane & 1) - 1, vec) * scale;
    for (int i = 0; i < size; i += LANES) {
        vec v = load(x + i), c = load(turn + i);
        store(y + i, v * (__builtin_shuffle(c, lane & ~1) * scale) +
                         __builtin_shuffle(v, lane ^ 1) * (__builtin_shuffle(c, lane | 1) * sign));
    }
}

/* ---- attention -------------------------------------------------------------------------------------------------------------- */
/* One query (K) over n keys. The lists go on, up to a multiple of LANES, with pointers that may be read. */
static __attribute__((unused)) void attend(const float *query, const float **keys, const float **values, int n, int size, float *logits, float *out)
{
    vec top = splat(-INFINITY), total = {0};
    for (int j = 0; j < n; j += LANES) {
        vec row[LANES];
        UNROLL for (int k = 0; k < LANES; k++) row[k] = load(query) * load(keys[j + k]);
        for (int i = LANES; i < size; i += LANES) {
            vec q = load(query + i);
            UNROLL for (int k = 0; k < LANES; k++) row[k] += q * load(keys[j + k] + i);
        }
        vec logit = sums_of(row);
        if (j + LANES > n)
            for (int k = n - j; k < LANES; k++) logit[k] = -INFINITY;
        store(logits + j, logit);
        top = maximum(top, logit);
    }
    const float most = largest(top);
    for (int j = 0; j < n; j += LANES) {
        vec weight = exponential(load(logits + j) - most);
        total += weight;
        store(logits + j, weight);
    }
    const float scale = 1.0f / sum(total);
    for (int i = 0; i < size; i += LANES) {
        vec part[4] = {{0}, {0}, {0}, {0}};
        int j = 0;
        for (; j + 4 <= n; j += 4)
            UNROLL for (int k = 0; k < 4; k++) part[k] += splat(logits[j + k]) * load(values[j + k] + i);
        for (int k = 0; j < n; j++, k++) part[k] += splat(logits[j]) * load(values[j] + i);
        store(out + i, ((part[0] + part[1]) + (part[2] + part[3])) * scale);
    }
}

/* Keys and values of one sequence's past, in one layer and head; returns how many. What it shares with the sequence
 * `before` it, or NULL, is listed. */
static __attribute__((unused)) int list_past(const Sequence *s, const Sequence *before, int layer, int head, int size,
                                             const float **keys, const float **values)
{
    int n = 0;
    for (int i = 0; i < s->cohort->segments; i++) {
        const Segment *g = s->cohort->segment + i;
        if (before && before->cohort == s->cohort && before->row / g->fold == s->row / g->fold) {
            n += g->tokens;
            continue;
        }
        const float *k = g->kv + layer * g->layer + (s->row / g->fold) * g->row + head * g->head;
        for (int j = 0; j < g->tokens; j++, n++) {
            keys[n] = k + (ptrdiff_t)j * size;
            values[n] = keys[n] + g->kind;
        }
    }
    return n;
}

/* Asks for what is cached of one sequence alone, so that it is there when its turn comes: each has a page of its own. */
INLINE void fetch(const Sequence *s, int layer, int head, int size)
{
    if (!s->cohort->segments) return;
    const Segment *g = s->cohort->segment + s->cohort->segments - 1;
    const float *k = g->kv + layer * g->layer + s->row * g->row + head * g->head;
    const int floats = g->tokens * size < FETCHED ? g->tokens * size : FETCHED;
    for (int i = 0; i < floats; i += 16) {
        __builtin_prefetch(k + i);
        __builtin_prefetch(k + g->kind + i);
    }
}

/* Where token `at` of a run keeps its key; its value lies `*kind` further. Streams but the first have no page. */
INLINE float *slot(const Scratch *s, const Transformer *t, int layer, int row, int stream, int head, int rows, int streams,
                   int run, int at, ptrdiff_t *kind)
{
    const Sequence *q = s->sequence + row;
    if (!stream && q->cohort->segments) {
        const Segment *g = q->cohort->segment + q->cohort->segments - 1;
        *kind = g->kind;
        return g->kv + layer * g->layer + q->row * g->row + head * g->head + (ptrdiff_t)(g->tokens + at) * t->head_dim;
    }
    *kind = (ptrdiff_t)rows * streams * t->heads * run * t->head_dim;
    ptrdiff_t index = (((ptrdiff_t)2 * layer * rows + row) * streams + stream) * t->heads + head;
    return s->kv + (index * run + at) * t->head_dim;
}

/* The layers over tokens start .. start + pass - 1 of a run, in x (B, S, R, W): each sees the past and, in its own stream,
 * itself and what is before it. */
static __attribute__((unused)) void layers(const Transformer *t, Scratch *s, int rows, int streams, int run, int start, int pass)
{
    const int m = rows * streams * pass, size = t->head_dim;
    const ptrdiff_t ld = padded(t->width), ld_qkv = padded(3 * t->width), ld_up = padded(4 * t->width);
    const float scale = 1.0f / sqrtf((float)size);
    for (int l = 0; l < t->layers; l++) {
        const Layer *layer = t->layer + l;
        layer_norm(s->x, layer->attention_gain, layer->attention_bias, t->width, m, ld, s->normal);
        linear(&layer->qkv, m, s->normal, ld, s->wide, ld_qkv, PLAIN);
        for (int head = 0; head < t->heads; head++)
            for (int row = 0; row < rows; row++) {
                const Sequence *sequence = s->sequence + row;
                if (row + 1 < rows) fetch(sequence + 1, l, head, size);
                const int past = list_past(sequence, row ? sequence - 1 : NULL, l, head, size, s->keys, s->values);
                for (int stream = 0; stream < streams; stream++) {
                    const int first = (row * streams + stream) * pass;
                    ptrdiff_t kind;
                    float *own = slot(s, t, l, row, stream, head, rows, streams, run, 0, &kind);
                    for (int i = 0; i < pass; i++) {
                        const float *qkv = s->wide + (first + i) * ld_qkv + head * size;
                        const float *turn = sequence->cohort->turns + (ptrdiff_t)(start + i) * size;
                        float *k = own + (ptrdiff_t)(start + i) * size;
                        rotate(qkv + t->width, turn, size, 1.0f, k);
                        memcpy(k + kind, qkv + 2 * t->width, size * sizeof(float));
                    }
                    for (int i = 0; i < start + pass; i++) {
                        s->keys[past + i] = own + (ptrdiff_t)i * size;
                        s->values[past + i] = s->keys[past + i] + kind;
                    }
                    for (int i = past + start + pass; i % LANES; i++) s->keys[i] = own;
                    for (int i = 0; i < pass; i++) {
                        float *q = s->wide + (first + i) * ld_qkv + head * size;
                        const int n = past + start + i + 1;
                        rotate(q, sequence->cohort->turns + (ptrdiff_t)(start + i) * size, size, scale, q);
                        attend(q, s->keys, s->values, n, size, s->logits, s->mixed + (first + i) * ld + head * size);
                    }
                }
            }
        linear(&layer->out, m, s->mixed, ld, s->x, ld, ADD);
        layer_norm(s->x, layer->mlp_gain, layer->mlp_bias, t->width, m, ld, s->normal);
        linear(&layer->up, m, s->normal, ld, s->wide, ld_up, GELU);
        linear(&layer->down, m, s->wide, ld_up, s->x, ld, ADD);
    }
}

/* The final norm and the head of `m` hidden states, to s->out (m, padded 2 D). */
static __attribute__((unused)) void head(const Transformer *t, Scratch *s, int m)
{
    const ptrdiff_t ld = padded(t->width);
    if (t->final_gain)
        for (int i = 0; i < m; i++) rms_norm(s->x + i * ld, t->final_gain, t->width, s->x + i * ld);
    linear(&t->head, m, s->x, ld, s->out, padded(t->head.outputs), PLAIN);
}

enum {
    FEWEST = 8, /* sequences a thread, at least: fewer would read the same weights for too little */
    MOST = 64   /* sequences at a time, at most: their hidden states stay in the cache */
};

#endif
