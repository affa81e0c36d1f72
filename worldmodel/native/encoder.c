/* The encoder of the small convolutional codec (worldmodel/codec/conv.py): frames to standardised latents. */
#include "convolution.h"

/* A 1x1 convolution `down` of 2x2 pixels of the level before, its inputs (2, 2, padded channels of that level), of which
 * the first level has none; then residual blocks. channels: a multiple of GROUPS. */
typedef struct {
    const Residual *blocks;
    int32_t count, channels;
    Linear down;
} Level;

/* The encoder to latents (latent_channels, height, width). `enter` has inputs (F, patch, patch, 3); background: (rows,
 * columns of the first level's pixels, patch, patch, 3); mean (latent_channels, height, width) and deviation
 * (latent_channels) of what `leave` gives. */
typedef struct {
    Convolution enter, leave;
    const Level *levels;
    const float *background, *mean, *deviation;
    int32_t count, latent_channels, height, width, frames, patch;
} Encoder;

/* What a call works in: pixels and activations with zeros around, latents without. */
typedef struct {
    Pictures pixels, latents, x[LEVELS], a[LEVELS], b[LEVELS];
    float *work;
} Scratch;

/* Lays out all buffers for up to `count` pictures; the floats that they take. */
static ptrdiff_t plan(Scratch *s, const Encoder *encoder, int count, float *memory)
{
    ptrdiff_t used = 0, work = 0;
    const int first = encoder->count - 1;
    for (int i = first; i >= 0; i--) {
        const Level *level = encoder->levels + i;
        const int h = encoder->height << (first - i), w = encoder->width << (first - i), pixel = padded(level->channels);
        reserve(s->x + i, count, h, w, pixel, 0, memory, &used);
        reserve(s->a + i, count, h, w, pixel, 1, memory, &used);
        reserve(s->b + i, count, h, w, pixel, 1, memory, &used);
        for (int k = 0; k < level->count; k++)
            work = larger(work, larger(work_size(&level->blocks[k].first, s->a + i),
                                       work_size(&level->blocks[k].second, s->b + i)));
        work = larger(work, larger(2 * pixel, (ptrdiff_t)count * h * w * padded(level->down.inputs)));
        if (i) continue;
        reserve(&s->pixels, count, h, w, padded(encoder->enter.inputs), 1, memory, &used);
        work = larger(work, work_size(&encoder->enter, &s->pixels));
    }
    reserve(&s->latents, count, encoder->height, encoder->width, padded(encoder->latent_channels), 0, memory, &used);
    work = larger(work, work_size(&encoder->leave, s->a + first));
    s->work = memory ? memory + used : NULL;
    return used + work;
}

/* Frames (F, rows, columns, 3) of one picture, less the background, to its pixels (F, patch, patch, 3). */
static void fold(const Encoder *encoder, const uint8_t *frames, const Pictures *y, int p)
{
    const int run = 3 * encoder->patch, size = run * encoder->patch;
    for (int i = 0; i < y->h; i++)
        for (int j = 0; j < y->w; j++) {
            float *to = y->data + place(y, p, i, j);
            const float *under = encoder->background + ((ptrdiff_t)i * y->w + j) * size;
            for (int f = 0; f < encoder->frames; f++)
                for (int k = 0; k < encoder->patch; k++, to += run) {
                    const uint8_t *from = frames + (((ptrdiff_t)f * y->h + i) * encoder->patch + k) * y->w * run + j * run;
                    for (int c = 0; c < run; c++) to[c] = (from[c] - under[k * run + c]) / PIXEL_SCALE;
                }
            for (float *end = y->data + place(y, p, i, j) + y->pixel; to < end; to++) *to = 0.0f;
        }
}

/* Rows (pixels of the next level, 2, 2, channels) of pictures x. */
static void gather(const Pictures *x, float *rows)
{
    for (int p = 0; p < x->count; p++)
        for (int i = 0; i < x->h; i += 2)
            for (int j = 0; j < x->w; j += 2)
                for (int k = 0; k < 2; k++, rows += 2 * x->pixel)
                    memcpy(rows, x->data + place(x, p, i + k, j), 2 * x->pixel * sizeof(float));
}

/* Latents (B, C, h, w) of frames (B, F, height, width, 3). */
typedef struct {
    const Encoder *encoder;
    const uint8_t *frames;
    float *latents;
} Job;

static int encode(const void *given, int begin, int rows)
{
    const Job *job = given;
    const Encoder *encoder = job->encoder;
    const int last = encoder->count - 1, end = begin + rows, channels = encoder->latent_channels;
    const Background none = {NULL, 1};
    Scratch s;
    if (encoder->count > LEVELS) return 1;
    const int pixels = (encoder->height * encoder->width) << (2 * last);
    const int together = smaller(rows, larger(1, smaller(TOGETHER, PIXELS_TOGETHER / pixels)));
    const size_t size = plan(&s, encoder, together, NULL) * sizeof(float);
    float *const memory = aligned_alloc(64, (size + 63) / 64 * 64);
    if (!memory) return 1;
    plan(&s, encoder, together, memory);
    const ptrdiff_t bytes = (ptrdiff_t)pixels * encoder->frames * 3 * encoder->patch * encoder->patch;
    for (int n; begin < end; begin += n) {
        n = smaller(together, end - begin);
        const Pictures from = first(s.pixels, n);
        for (int p = 0; p < n; p++) fold(encoder, job->frames + (begin + p) * bytes, &from, p);
        for (int l = 0; l <= last; l++) {
            const Level *level = encoder->levels + l;
            const Pictures x = first(s.x[l], n), a = first(s.a[l], n), b = first(s.b[l], n);
            if (l == 0) convolve(&encoder->enter, &from, &x, none, s.work);
            else {
                const Pictures finer = first(s.x[l - 1], n);
                gather(&finer, s.work);
                linear(&level->down, n * x.h * x.w, s.work, 4 * finer.pixel, x.data, x.pixel, PLAIN);
            }
            for (const Residual *block = level->blocks; block < level->blocks + level->count; block++) {
                activate(&x, &a, block, level->channels, s.work);
                convolve_silu(&block->first, &a, &b, none, s.work);
                convolve_add(&block->second, &b, &x, none, s.work);
            }
        }
        const Pictures x = first(s.x[last], n), a = first(s.a[last], n), y = first(s.latents, n);
        activate(&x, &a, NULL, encoder->levels[last].channels, s.work);
        convolve(&encoder->leave, &a, &y, none, s.work);
        for (int p = 0; p < n; p++)
            for (int c = 0; c < channels; c++)
                for (int i = 0; i < y.h * y.w; i++) {
                    const ptrdiff_t at = (ptrdiff_t)c * y.h * y.w + i;
                    job->latents[(ptrdiff_t)(begin + p) * channels * y.h * y.w + at] =
                        (y.data[place(&y, p, i / y.w, i % y.w) + c] - encoder->mean[at]) / encoder->deviation[c];
                }
    }
    free(memory);
    return 0;
}

/* Nonzero if there is no memory for it, or there are more than LEVELS. */
int worldmodel_encode(const Encoder *encoder, const uint8_t *frames, float *latents, int rows, int threads)
{
    const Job job = {encoder, frames, latents};
    return share_out(encode, &job, rows, 2, rows, threads);
}
