/* The flow's transformers on a CPU: a whole frame inverted token by token, a run of known tokens, and the denoiser, each
 * in one call. The mathematics is that of worldmodel/flow (block.py, deep.py, attention.py, denoiser.py), which computes
 * the same with torch where this does not serve; worldmodel/native/__init__.py says where it does.
 *
 * Axis letters: B rows (sequences), S streams (the same tokens under the action and under none), R tokens of a pass, N
 * tokens of a frame, D dimensions of a token, W width, H heads, K head width. Sequences do not depend on each other, bit
 * for bit, so threads share them out in any way. */
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

/* What makes an autoregressive block of a transformer: SOS (D), the token before the first; whether its own order is the
 * raster's backwards; see `affine_from_head` for soft_clip. */
typedef struct {
    const Transformer *transformer;
    const float *sos;
    float soft_clip;
    int32_t flip;
} Block;

/* Cached keys and values: (layers, 2, rows, H, tokens, K) with these strides, in floats; one stored row serves `fold`. */
typedef struct {
    float *kv;
    int64_t layer, kind, row, head;
    int32_t tokens, fold;
} Segment;

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

static void sequences(const Cohort *cohort, int begin, int rows, Sequence *into)
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
static int allocate(Scratch *s, const Transformer *t, int rows, int streams, int pass, int run, int past)
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
static void layer_norm(const float *x, const float *gain, const float *bias, int width, int rows, ptrdiff_t ld, float *y)
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

static void rms_norm(const float *x, const float *gain, int width, float *y)
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
static void attend(const float *query, const float **keys, const float **values, int n, int size, float *logits, float *out)
{
    const vec lowest = splat(-INFINITY);
    vec top = lowest, total = {0};
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
        vec logit = load(logits + j), weight = choose(below(lowest, logit), exponential(logit - most), splat(0.0f));
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

/* Keys and values of one sequence's past, in one layer and head; returns how many. */
static int list_past(const Sequence *s, int layer, int head, int size, const float **keys, const float **values)
{
    int n = 0;
    for (int i = 0; i < s->cohort->segments; i++) {
        const Segment *g = s->cohort->segment + i;
        const float *k = g->kv + layer * g->layer + (s->row / g->fold) * g->row + head * g->head;
        for (int j = 0; j < g->tokens; j++, n++) {
            keys[n] = k + (ptrdiff_t)j * size;
            values[n] = keys[n] + g->kind;
        }
    }
    return n;
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
static void layers(const Transformer *t, Scratch *s, int rows, int streams, int run, int start, int pass)
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
                const int past = list_past(sequence, l, head, size, s->keys, s->values);
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

/* ---- the affine map ------------------------------------------------------------------------------------------------------- */
typedef struct {
    float *mu, *sigma; /* (D), with LANES floats of room behind */
} Affine;

/* Outputs o (2 D) of the head to mu and sigma: see `affine_from_head`. */
static void affine(const float *o, int token, float soft_clip, Affine into)
{
    const vec clip = splat(soft_clip);
    for (int i = 0; i < token; i += LANES) {
        vec a = load(o + i), mu = load(o + token + i);
        if (soft_clip > 0) {
            a = clip * hyperbolic_tangent(a / clip);
            mu = clip * hyperbolic_tangent(mu / clip);
        }
        store(into.mu + i, mu);
        store(into.sigma + i, softplus(a + 0.541324854612918f));
    }
}

/* The final norm and the head of `m` hidden states, to s->out (m, padded 2 D). */
static void head(const Transformer *t, Scratch *s, int m)
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

/* ---- a frame, token by token ------------------------------------------------------------------------------------------------ */
/* noise, v (B, N, D) and mu, sigma (S, B, N, D), raster order. last (B, D): the token before, for rows that are not fresh,
 * with a stride of its own. features (B, E) or NULL. log_det (B, N, D): -log sigma is added to it, unless it is NULL. */
typedef struct {
    Block block;
    const Cohort *cohort;
    const float *noise, *last, *features;
    int64_t last_stride;
    float *v, *mu, *sigma, *log_det;
    int32_t rows, streams, tokens, feature_size;
} Frame;

static int longest_past(const Sequence *s, int rows)
{
    int most = 0;
    for (int i = 0; i < rows; i++) most = s[i].past > most ? s[i].past : most;
    return most;
}

static int invert(const Frame *f, int begin, int rows)
{
    const Transformer *t = f->block.transformer;
    const int streams = f->streams, n = f->tokens, d = t->in.inputs, flip = f->block.flip;
    const ptrdiff_t ld = padded(t->width), ld_out = padded(t->head.outputs);
    Sequence listed[rows];
    sequences(f->cohort, begin, rows, listed);
    Scratch s;
    float tokens[rows * d], action[rows * ld], mu[d + LANES], sigma[d + LANES];
    if (allocate(&s, t, rows, streams, 1, n, longest_past(listed, rows))) return 1;
    memcpy(s.sequence, listed, sizeof listed);
    for (int row = 0; row < rows; row++)
        memcpy(tokens + row * d, listed[row].cohort->fresh ? f->block.sos : f->last + (begin + row) * f->last_stride,
               d * sizeof(float));
    const int acts = f->features && t->action.inputs;
    if (acts) linear(&t->action, rows, f->features + (ptrdiff_t)begin * f->feature_size, f->feature_size, action, ld, PLAIN);
    for (int i = 0; i < n; i++) {
        const int at = flip ? n - 1 - i : i;
        linear(&t->in, rows, tokens, d, s.normal, ld, PLAIN);
        for (int row = 0; row < rows; row++)
            for (int stream = 0; stream < streams; stream++) {
                float *x = s.x + (row * streams + stream) * ld;
                const float *embedded = s.normal + row * ld;
                for (int j = 0; j < ld; j += LANES)
                    store(x + j, load(embedded + j) + (acts && !stream ? load(action + row * ld + j) : splat(0.0f)));
            }
        layers(t, &s, rows, streams, n, i, 1);
        head(t, &s, rows * streams);
        for (int row = 0; row < rows; row++)
            for (int stream = 0; stream < streams; stream++) {
                const ptrdiff_t index = ((ptrdiff_t)(stream * f->rows + begin + row) * n + at) * d;
                affine(s.out + (row * streams + stream) * ld_out, d, f->block.soft_clip, (Affine){mu, sigma});
                memcpy(f->mu + index, mu, d * sizeof(float));
                memcpy(f->sigma + index, sigma, d * sizeof(float));
                if (stream) continue;
                float *token = tokens + row * d;
                for (int j = 0; j < d; j++) token[j] = mu[j] + sigma[j] * f->noise[index + j];
                memcpy(f->v + index, token, d * sizeof(float));
                if (!f->log_det) continue;
                for (int j = 0; j < d; j += LANES) store(mu + j, logarithm(load(sigma + j)));
                for (int j = 0; j < d; j++) f->log_det[index + j] -= mu[j];
            }
    }
    free(s.memory);
    return 0;
}

/* Blocks one after the other, each one's noise the v of the one before. */
typedef struct {
    const Frame *frame;
    int frames;
} Chain;

static int invert_chain(const void *job, int begin, int rows)
{
    const Chain *chain = job;
    int failed = 0;
    for (int i = 0; i < chain->frames && !failed; i++) failed = invert(chain->frame + i, begin, rows);
    return failed;
}

int worldmodel_invert(const Frame *frame, int frames, int threads)
{
    const Chain chain = {frame, frames};
    return share_out(invert_chain, &chain, frame->rows, FEWEST, MOST, threads);
}

/* ---- a run of known tokens ------------------------------------------------------------------------------------------------- */
/* v, mu, sigma (B, T * N, D), raster order within each frame; mu NULL: only keys and values are wanted. last as in `Frame`.
 * features (B, T, E) or NULL. */
typedef struct {
    Block block;
    const Cohort *cohort;
    const float *v, *last, *features;
    int64_t last_stride;
    float *mu, *sigma;
    int32_t rows, frames, tokens, feature_size;
} Known;

static int extend(const void *job, int begin, int rows)
{
    const Known *f = job;
    const Transformer *t = f->block.transformer;
    const int n = f->tokens, run = f->frames * n, d = t->in.inputs, flip = f->block.flip;
    const ptrdiff_t ld = padded(t->width), ld_out = padded(t->head.outputs);
    Sequence listed[rows];
    sequences(f->cohort, begin, rows, listed);
    Scratch s;
    float mu[d + LANES], sigma[d + LANES];
    if (allocate(&s, t, rows, 1, run, run, longest_past(listed, rows))) return 1;
    memcpy(s.sequence, listed, sizeof listed);
    for (int row = 0; row < rows; row++) {
        const float *v = f->v + (ptrdiff_t)(begin + row) * run * d;
        float *inputs = s.wide;
        for (int i = 0; i < run; i++) {
            const float *before = listed[row].cohort->fresh ? f->block.sos : f->last + (begin + row) * f->last_stride;
            if (i) before = v + (ptrdiff_t)((i - 1) / n * n + (flip ? n - 1 - (i - 1) % n : (i - 1) % n)) * d;
            memcpy(inputs + i * d, before, d * sizeof(float));
        }
        linear(&t->in, run, inputs, d, s.x + row * run * ld, ld, PLAIN);
        if (!f->features || !t->action.inputs) continue;
        linear(&t->action, f->frames, f->features + (ptrdiff_t)(begin + row) * f->frames * f->feature_size,
               f->feature_size, s.normal, ld, PLAIN);
        for (int i = 0; i < run; i++) {
            float *x = s.x + (row * run + i) * ld;
            for (int j = 0; j < ld; j += LANES) store(x + j, load(x + j) + load(s.normal + i / n * ld + j));
        }
    }
    layers(t, &s, rows, 1, run, 0, run);
    if (f->mu) head(t, &s, rows * run);
    for (int row = 0; f->mu && row < rows; row++)
        for (int i = 0; i < run; i++) {
            const int at = i / n * n + (flip ? n - 1 - i % n : i % n);
            const ptrdiff_t index = ((ptrdiff_t)(begin + row) * run + at) * d;
            affine(s.out + (row * run + i) * ld_out, d, f->block.soft_clip, (Affine){mu, sigma});
            memcpy(f->mu + index, mu, d * sizeof(float));
            memcpy(f->sigma + index, sigma, d * sizeof(float));
        }
    free(s.memory);
    return 0;
}

int worldmodel_extend(const Known *known, int threads) { return share_out(extend, known, known->rows, FEWEST, MOST, threads); }

/* ---- the denoiser's newest frame ------------------------------------------------------------------------------------------- */
/* noisy (B, T, N, D) and features (B, T, E) or NULL, right-aligned; row b's first `missing[b]` frames do not exist. A token
 * sees its frame and the `window` frames before it. asking: of each layer, how many frames go on. turns ((window + 1) * N,
 * K / 2): a frame's own place is the last, whichever frame it is, so that what is kept of it serves in later steps: cached
 * and kept (B, layers, 2, window * N, W), keys not yet rotated. With `cached`, T is 1 and the frames before are there;
 * `missing` then counts within window + 1 frames. score (B, N, outputs) of the last frame. */
typedef struct {
    const Transformer *transformer;
    const float *noisy, *features, *turns, *cached;
    const int32_t *missing, *asking;
    float *score, *kept;
    int32_t rows, frames, tokens, feature_size, window;
} Newest;

/* Keys and values of one row in one layer, of `before` cached tokens and of `here` in s->wide; queries of the last `asking`
 * frames of `frames`. */
static void attend_frames(const Newest *f, Scratch *s, const float *cached, const float *wide, int missing, int frames,
                          int before, int asking, float *mixed, float *kept)
{
    const Transformer *t = f->transformer;
    const int n = f->tokens, size = t->head_dim, window = f->window, width = t->width;
    const ptrdiff_t ld = padded(width), ld_qkv = padded(3 * width), kind = (ptrdiff_t)window * n * width;
    const float scale = 1.0f / sqrtf((float)size);
    float query[size];
    for (int head = 0; head < t->heads; head++)
        for (int frame = frames - asking; frame < frames; frame++) {
            int first = frame - window > 0 ? frame - window : 0, count = 0;
            if (first < missing) first = missing < frame ? missing : frame;
            for (int j = first; j <= frame; j++)
                for (int i = 0; i < n; i++, count++) {
                    const int at = j * n + i;
                    const float *k = wide + (ptrdiff_t)(at - before) * ld_qkv + width + head * size;
                    s->values[count] = k + width;
                    if (at < before) k = cached + (ptrdiff_t)at * width + head * size, s->values[count] = k + kind;
                    float *rotated = s->kv + (ptrdiff_t)count * size;
                    rotate(k, f->turns + (ptrdiff_t)((window - frame + j) * n + i) * size, size, 1.0f, rotated);
                    s->keys[count] = rotated;
                }
            for (int i = count; i % LANES; i++) s->keys[i] = s->kv;
            for (int i = 0; i < n; i++) {
                const int at = frame * n + i;
                const float *q = wide + (ptrdiff_t)(at - before) * ld_qkv + head * size;
                rotate(q, f->turns + (ptrdiff_t)(window * n + i) * size, size, scale, query);
                attend(query, s->keys, s->values, count, size, s->logits,
                       mixed + (ptrdiff_t)((frame - frames + asking) * n + i) * ld + head * size);
            }
        }
    for (int i = 0; i < window * n; i++) { /* the last `window` frames, zeros where there are fewer */
        const int at = (frames - window) * n + i;
        float *k = kept + (ptrdiff_t)i * width;
        if (at < 0) {
            memset(k, 0, width * sizeof(float));
            memset(k + kind, 0, width * sizeof(float));
        } else if (at < before) {
            memcpy(k, cached + (ptrdiff_t)at * width, width * sizeof(float));
            memcpy(k + kind, cached + kind + (ptrdiff_t)at * width, width * sizeof(float));
        } else {
            const float *from = wide + (ptrdiff_t)(at - before) * ld_qkv + width;
            memcpy(k, from, width * sizeof(float));
            memcpy(k + kind, from + width, width * sizeof(float));
        }
    }
}

static int denoise(const void *job, int begin, int rows)
{
    const Newest *f = job;
    const Transformer *t = f->transformer;
    const int n = f->tokens, all = f->frames * n, d = t->in.inputs, before = f->cached ? f->window : 0;
    const ptrdiff_t ld = padded(t->width);
    const ptrdiff_t ld_qkv = padded(3 * t->width), ld_up = padded(4 * t->width), ld_out = padded(t->head.outputs);
    const ptrdiff_t kv = (ptrdiff_t)2 * f->window * n * t->width;
    const int most = f->cached ? MOST : FEWEST; /* rows at a time */
    Scratch s;
    if (allocate(&s, t, rows < most ? rows : most, 1, all, all + (f->window + 1) * n, 0)) return 1;
    for (int end = begin + rows, row = begin, some; row < end; row += some) {
        some = end - row < most ? end - row : most;
        linear(&t->in, some * all, f->noisy + (ptrdiff_t)row * all * d, d, s.x, ld, PLAIN);
        if (f->features && t->action.inputs) {
            linear(&t->action, some * f->frames, f->features + (ptrdiff_t)row * f->frames * f->feature_size,
                   f->feature_size, s.normal, ld, PLAIN);
            for (int i = 0; i < some * all; i++)
                for (int j = 0; j < ld; j += LANES)
                    store(s.x + i * ld + j, load(s.x + i * ld + j) + load(s.normal + i / n * ld + j));
        }
        for (int l = 0, here = f->frames; l < t->layers; l++) {
            const Layer *layer = t->layer + l;
            const int asking = f->asking[l], m = some * asking * n;
            layer_norm(s.x, layer->attention_gain, layer->attention_bias, t->width, some * here * n, ld, s.normal);
            linear(&layer->qkv, some * here * n, s.normal, ld, s.wide, ld_qkv, PLAIN);
            for (int i = 0; i < some; i++) {
                const ptrdiff_t place = ((ptrdiff_t)(row + i) * t->layers + l) * kv;
                const int absent = f->missing[row + i] - (f->cached ? 0 : f->frames - here);
                attend_frames(f, &s, f->cached ? f->cached + place : NULL, s.wide + i * here * n * ld_qkv,
                              absent > 0 ? absent : 0, before + here, before * n, asking, s.mixed + i * asking * n * ld,
                              f->kept + place);
                memmove(s.x + i * asking * n * ld, s.x + ((i + 1) * here - asking) * n * ld, asking * n * ld * sizeof(float));
            }
            here = asking;
            linear(&layer->out, m, s.mixed, ld, s.x, ld, ADD);
            layer_norm(s.x, layer->mlp_gain, layer->mlp_bias, t->width, m, ld, s.normal);
            linear(&layer->up, m, s.normal, ld, s.wide, ld_up, GELU);
            linear(&layer->down, m, s.wide, ld_up, s.x, ld, ADD);
        }
        head(t, &s, some * n);
        for (int i = 0; i < some * n; i++)
            memcpy(f->score + ((ptrdiff_t)row * n + i) * d, s.out + i * ld_out, d * sizeof(float));
    }
    free(s.memory);
    return 0;
}

int worldmodel_denoise(const Newest *newest, int threads) { return share_out(denoise, newest, newest->rows, FEWEST, MOST, threads); }

/* ---- density --------------------------------------------------------------------------------------------------------------- */
/* Of u, log_det (B, size) under affine maps mu, sigma (S, B, size): z and elementwise nats (B, size) under the first, and
 * the nats log_prob (S, B) under each. */
typedef struct {
    const float *u, *mu, *sigma, *log_det;
    float *z, *elements;
    double *log_prob;
    int32_t streams, rows, size;
} Density;

void worldmodel_density(const Density *f)
{
    const ptrdiff_t all = (ptrdiff_t)f->rows * f->size;
    float nats[LANES], noise[LANES];
    for (int stream = 0; stream < f->streams; stream++)
        for (int row = 0; row < f->rows; row++) {
            double total = 0;
            for (int j = 0; j < f->size; j += LANES) {
                const int count = f->size - j < LANES ? f->size - j : LANES;
                const ptrdiff_t at = (ptrdiff_t)row * f->size + j, map = stream * all + at;
                float part[4][LANES] = {{0}, {0}, {0}, {0}};
                for (int k = 0; k < LANES; k++) part[2][k] = 1.0f;
                memcpy(part[0], f->u + at, count * sizeof(float));
                memcpy(part[1], f->mu + map, count * sizeof(float));
                memcpy(part[2], f->sigma + map, count * sizeof(float));
                memcpy(part[3], f->log_det + at, count * sizeof(float));
                vec z = (load(part[0]) - load(part[1])) / load(part[2]);
                store(noise, z);
                store(nats, load(part[3]) - logarithm(load(part[2])) - 0.5f * (z * z + 1.8378770664f));
                for (int k = 0; k < count; k++) total += nats[k];
                if (stream) continue;
                memcpy(f->z + at, noise, count * sizeof(float));
                memcpy(f->elements + at, nats, count * sizeof(float));
            }
            f->log_prob[(ptrdiff_t)stream * f->rows + row] = total;
        }
}

/* ---- what this library is ---------------------------------------------------------------------------------------------------- */
/* Columns of a panel of packed weights, and the version of this interface: see worldmodel/native/__init__.py. */
int worldmodel_panel(void) { return PANEL; }
int worldmodel_interface(void) { return 1; }
