/* The decoder of the small convolutional codec (worldmodel/codec/conv.py): standardised latents to frames. */
#include "convolution.h"

/* Residual blocks of one size of pictures, and the 1x1 convolution to the next, of twice the size: its
 * outputs are (2, 2, padded channels of the next level). The last level has none. channels: a multiple of
 * GROUPS. */
typedef struct {
    const Residual *blocks;
    int32_t count, channels;
    Linear up;
} Level;

/* The decoder of latents (latent_channels, height, width). `leave` has outputs (F, patch, patch, 3);
 * background (h, w of the last level, 3 * patch^2 + LANES): a pixel's patch (patch, patch, 3), then its
 * start again. */
typedef struct {
    Convolution enter, leave;
    const Level *levels;
    const float *background;
    int32_t count, latent_channels, height, width, frames, patch;
} Decoder;

/* What a call works in. */
typedef struct {
    Buffers levels[LEVELS];
    Pictures latents, bytes; /* latents with zeros around; a byte an element */
    float *work;
} Scratch;

/* The next level's pictures y from `rows` of a 1x1 convolution, (pixels, 2, 2, channels). */
static void shuffle(const float *rows, const Pictures *y)
{
    for (int p = 0; p < y->count; p++)
        for (int i = 0; i < y->h; i += 2)
            for (int j = 0; j < y->w; j += 2)
                for (int k = 0; k < 2; k++, rows += 2 * y->pixel)
                    memcpy(y->data + place(y, p, i + k, j), rows,
                           2 * y->pixel * sizeof(float));
}

/* One picture's frames (F, height, width, 3) from its bytes, (F, patch, patch, 3) a pixel. */
static void unfold(const uint8_t *bytes, const Pictures *shape, int frames, int patch, uint8_t *to)
{
    for (int f = 0; f < frames; f++)
        for (int i = 0; i < shape->h; i++)
            for (int k = 0; k < patch; k++)
                for (int j = 0; j < shape->w; j++, to += 3 * patch) {
                    const uint8_t *from = bytes + place(shape, 0, i, j) + (f * patch + k) * 3 * patch;
                    if (patch == 4) memcpy(to, from, 12);
                    else memcpy(to, from, 3 * patch);
                }
}

/* Lays out all buffers for up to `count` pictures; the floats that they take. */
static ptrdiff_t plan(Scratch *s, const Decoder *decoder, int count, float *memory)
{
    ptrdiff_t used = 0, work = 0;
    int h = decoder->height, w = decoder->width;
    for (int i = 0; i < decoder->count; i++, h *= 2, w *= 2) {
        const Level *level = decoder->levels + i;
        Buffers *to = s->levels + i;
        const int channels = padded(level->channels);
        count = smaller(count, larger(1, smaller(TOGETHER, PIXELS_TOGETHER / (h * w))));
        if (i == 0) {
            reserve(&s->latents, count, h, w, padded(decoder->latent_channels), 1, memory, &used);
            work = work_size(&decoder->enter, &s->latents);
        }
        reserve(&to->x, count, h, w, channels, 0, memory, &used);
        reserve(&to->a, count, h, w, channels, 1, memory, &used);
        reserve(&to->b, count, h, w, channels, 1, memory, &used);
        for (int k = 0; k < level->count; k++)
            work = larger(work, larger(work_size(&level->blocks[k].first, &to->a),
                                       work_size(&level->blocks[k].second, &to->b)));
        work = larger(work, larger(2 * channels, (ptrdiff_t)count * h * w * padded(level->up.outputs)));
    }
    work = larger(work, work_size(&decoder->leave, &s->levels[decoder->count - 1].a));
    reserve(&s->bytes, count, h / 2, w / 2, padded(decoder->leave.outputs), 0, memory, &used);
    s->work = memory ? memory + used : NULL;
    return used + work;
}

/* Bytes of one picture's frames. */
static ptrdiff_t frames_size(const Decoder *decoder, const Scratch *s)
{
    return (ptrdiff_t)decoder->frames * 3 * decoder->patch * decoder->patch * s->bytes.h * s->bytes.w;
}

/* From x of a level, its first `count` pictures, to frames. The next takes as many at a time as it holds. */
static void decode_level(const Decoder *decoder, const Scratch *s, int index, int count, uint8_t *frames)
{
    const Level *level = decoder->levels + index;
    const Buffers *from = s->levels + index;
    const Pictures x = first(from->x, count), a = first(from->a, count), b = first(from->b, count);
    const Background none = {NULL, 1}, under = {decoder->background, 3 * decoder->patch * decoder->patch};
    const ptrdiff_t size = frames_size(decoder, s);
    for (const Residual *block = level->blocks; block < level->blocks + level->count; block++) {
        activate(&x, &a, block, level->channels, s->work);
        convolve_silu(&block->first, &a, &b, none, s->work);
        convolve_add(&block->second, &b, &x, none, s->work);
    }
    if (index < decoder->count - 1) {
        for (int p = 0, n; p < count; p += n, frames += n * size) {
            n = smaller(from[1].x.count, count - p);
            const Pictures next = first(from[1].x, n);
            linear(&level->up, n * x.h * x.w, x.data + p * x.picture, x.pixel, s->work,
                   padded(level->up.outputs), PLAIN);
            shuffle(s->work, &next);
            decode_level(decoder, s, index + 1, n, frames);
        }
    } else {
        const Pictures bytes = first(s->bytes, count);
        activate(&x, &a, NULL, level->channels, s->work);
        convolve_pixels(&decoder->leave, &a, &bytes, under, s->work);
        for (int p = 0; p < count; p++, frames += size)
            unfold((const uint8_t *)bytes.data + p * bytes.picture, &bytes, decoder->frames, decoder->patch,
                   frames);
    }
}

/* Frames (B, F, height, width, 3) from latents (B, C, h, w). */
typedef struct {
    const Decoder *decoder;
    const float *latents;
    uint8_t *frames;
} Job;

static int decode(const void *given, int begin, int rows)
{
    const Job *job = given;
    const Decoder *decoder = job->decoder;
    const float *latents = job->latents;
    uint8_t *frames = job->frames;
    const int end = begin + rows;
    Scratch s;
    if (decoder->count > LEVELS) return 1;
    const size_t size = plan(&s, decoder, end - begin, NULL) * sizeof(float);
    float *const memory = aligned_alloc(64, (size + 63) / 64 * 64);
    if (!memory) return 1;
    plan(&s, decoder, end - begin, memory);
    const int channels = decoder->latent_channels, cells = decoder->height * decoder->width;
    for (int n; begin < end; begin += n) {
        n = smaller(s.levels[0].x.count, end - begin);
        const Pictures from = first(s.latents, n), x = first(s.levels[0].x, n);
        for (int p = 0; p < n; p++)
            for (int i = 0; i < cells; i++)
                for (int c = 0; c < from.pixel; c++)
                    from.data[place(&from, p, i / from.w, i % from.w) + c] =
                        c < channels ? latents[((ptrdiff_t)(begin + p) * channels + c) * cells + i] : 0.0f;
        convolve(&decoder->enter, &from, &x, (Background){NULL, 1}, s.work);
        decode_level(decoder, &s, 0, n, frames + begin * frames_size(decoder, &s));
    }
    free(memory);
    return 0;
}

/* Nonzero if there is no memory for it, or there are more than LEVELS. */
int worldmodel_decode(const Decoder *decoder, const float *latents, uint8_t *frames, int rows, int threads)
{
    const Job job = {decoder, latents, frames};
    return share_out(decode, &job, rows, 2, rows, threads);
}
