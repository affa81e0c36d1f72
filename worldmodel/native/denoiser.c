/* The denoiser of the newest frame in one call, as worldmodel/flow/denoiser.py does it with torch. See transformer.h. */
#include "transformer.h"

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
