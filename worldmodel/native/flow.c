/* The flow's blocks: a frame inverted token by token through all of them, a run of known tokens through one, and densities,
 * each in one call; as worldmodel/flow/deep.py and block.py do it with torch. See transformer.h. */
#include "transformer.h"

/* What makes an autoregressive block of a transformer: SOS (D), the token before the first; whether its own order is the
 * raster's backwards; see `affine_from_head` for soft_clip. */
typedef struct {
    const Transformer *transformer;
    const float *sos;
    float soft_clip;
    int32_t flip;
} Block;

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
int worldmodel_interface(void) { return 3; }

/* Whether this processor and system let it run, and whether it multiplies TILED weights. */
#if defined(__AMX_TILE__)
int worldmodel_usable(void) { return tiles_usable(); }
int worldmodel_tiled(void) { return 1; }
#else
int worldmodel_usable(void) { return 1; }
int worldmodel_tiled(void) { return 0; }
#endif
