/* Vectors of floats as wide as the processor's registers, elementary functions on them, and matrix products of packed
 * weights. All arithmetic is float32; a row of a product is the same, bit for bit, whatever rows are beside it: every
 * sum over k goes from 0 to K - 1 in one accumulator a lane.
 *
 * Compiled once for x86-64-v4 (AVX-512) and once for x86-64-v3 (AVX2); see setup.py. */
#ifndef WORLDMODEL_VECTOR_H
#define WORLDMODEL_VECTOR_H

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#if defined(__AVX512F__)
#define LANES 16
#define TILE_ROWS 12 /* rows of a register tile: 12 x 2 accumulators of 32 registers */
#else
#define LANES 8
#define TILE_ROWS 6 /* 6 x 2 of 16 */
#endif
#define PANEL (2 * LANES) /* columns of a panel of packed weights */

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef float vec_unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

INLINE vec load(const float *p) { return *(const vec_unaligned *)p; }
INLINE void store(float *p, vec v) { *(vec_unaligned *)p = v; }
INLINE vec splat(float x)
{
#if LANES == 16
    return (vec)_mm512_set1_ps(x);
#else
    return (vec)_mm256_set1_ps(x);
#endif
}
INLINE vec absolute(vec x) { return (vec)((ivec)x & 0x7fffffff); }

#if LANES == 16
typedef __mmask16 mask;
INLINE mask below(vec a, vec b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ); }
INLINE vec choose(mask m, vec yes, vec no) { return (vec)_mm512_mask_blend_ps(m, (__m512)no, (__m512)yes); }
/* Of `minimum` and `maximum` the second, where either is not a number. */
INLINE vec minimum(vec a, vec b) { return (vec)_mm512_min_ps((__m512)a, (__m512)b); }
INLINE vec maximum(vec a, vec b) { return (vec)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE vec estimate(vec x) { return (vec)_mm512_rcp14_ps((__m512)x); }
#else
typedef __m256 mask;
INLINE mask below(vec a, vec b) { return _mm256_cmp_ps((__m256)a, (__m256)b, _CMP_LT_OQ); }
INLINE vec choose(mask m, vec yes, vec no) { return (vec)_mm256_blendv_ps((__m256)no, (__m256)yes, m); }
INLINE vec minimum(vec a, vec b) { return (vec)_mm256_min_ps((__m256)a, (__m256)b); }
INLINE vec maximum(vec a, vec b) { return (vec)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE vec estimate(vec x) { return (vec)_mm256_rcp_ps((__m256)x); }
#endif

/* 1 / x to about 1e-7 of it: cheaper than a division. */
INLINE vec reciprocal(vec x)
{
    vec r = estimate(x);
#if LANES == 8 /* whose estimate has 12 bits, not 14 */
    r += r * (1.0f - x * r);
#endif
    return r + r * (1.0f - x * r);
}

INLINE vec load_half(const uint16_t *p)
{
#if LANES == 16
    return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#else
    return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#endif
}

/* Lane l of the result is the sum over the lanes of row[l]. All rows are added up in the same order. */
INLINE vec sums_of(vec row[LANES])
{
    ivec lane;
    UNROLL for (int i = 0; i < LANES; i++) lane[i] = i;
    UNROLL for (int d = 1; d < LANES; d *= 2) {
        ivec second = (lane & d) != 0; /* lanes of the second of two rows */
        ivec low = lane + (second & (LANES - d)), high = lane + (~second & d) + (second & LANES);
        UNROLL for (int i = 0; i < LANES / d / 2; i++) {
            vec a = row[2 * i], b = row[2 * i + 1];
            row[i] = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
        }
    }
    return row[0];
}

INLINE float sum(vec v)
{
    float part[LANES];
    store(part, v);
    UNROLL for (int half = LANES / 2; half; half /= 2)
        UNROLL for (int i = 0; i < half; i++) part[i] += part[i + half];
    return part[0];
}

INLINE float largest(vec v)
{
    float part[LANES];
    store(part, v);
    UNROLL for (int half = LANES / 2; half; half /= 2)
        UNROLL for (int i = 0; i < half; i++) part[i] = part[i] > part[i + half] ? part[i] : part[i + half];
    return part[0];
}

/* ---- elementary functions: relative errors of about 1e-7; not a number stays what it is ------------------------------ */

/* e^x; x is clamped to [-87, 88]. */
INLINE vec exponential(vec x)
{
    x = minimum(splat(88.0f), maximum(splat(-87.0f), x));
    const vec magic = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    vec n = (x * 1.44269504f + magic) - magic;
    vec r = x - n * 0.693145752f;
    r -= n * 1.42860677e-6f;
    vec p = splat(0.0013836834f);
    p = p * r + 0.008374822f;
    p = p * r + 0.041668225f;
    p = p * r + 0.1666642f;
    p = p * r + 0.4999999f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    ivec power = __builtin_convertvector(n, ivec);
    return (vec)((ivec)p + (power << 23));
}

/* Natural logarithm of positive, normal numbers. */
INLINE vec logarithm(vec x)
{
    ivec exponent = ((ivec)x - 0x3f3504f3) >> 23; /* x = 2^exponent m, m from sqrt(1/2) to sqrt(2) */
    vec f = (vec)((ivec)x - (exponent << 23)) - 1.0f;
    vec p = splat(0.06917984f);
    p = p * f + -0.11779667f;
    p = p * f + 0.11866035f;
    p = p * f + -0.12385798f;
    p = p * f + 0.14219919f;
    p = p * f + -0.16669197f;
    p = p * f + 0.20002152f;
    p = p * f + -0.24999987f;
    p = p * f + 0.3333331f;
    vec n = __builtin_convertvector(exponent, vec), square = f * f;
    vec low = p * f * square + n * 1.42860677e-6f;
    return (low - square * 0.5f) + f + n * 0.693145752f;
}

/* log(1 + e^x) for |x| up to 80. */
INLINE vec softplus(vec x)
{
    vec e = exponential(x), u = e + 1.0f;
    vec lost = (e - (u - 1.0f)) / u; /* what rounding u lost */
    return choose(below(x, splat(20.0f)), logarithm(u) + lost, x);
}

INLINE vec hyperbolic_tangent(vec x)
{
    vec a = absolute(x), z = x * x;
    vec p = splat(0.002269322f);
    p = p * z + -0.00832298f;
    p = p * z + 0.021762416f;
    p = p * z + -0.053958446f;
    p = p * z + 0.133333f;
    p = p * z + -0.33333334f;
    vec small = x + x * z * p;
    vec large = 1.0f - 2.0f / (exponential(2.0f * a) + 1.0f);
    large = choose(below(x, splat(0.0f)), -large, large);
    return choose(below(splat(0.4f), z), large, small);
}

/* x Phi(x), with Phi the standard normal distribution function (the exact GELU): x / 2 (1 + erf(x / sqrt 2)), and erf(y) / y
 * as a ratio of polynomials in y^2 that were fitted on |y| < 3.9, beyond which it is 1 to float32's precision. */
INLINE vec gelu(vec x)
{
    vec y = minimum(maximum(x * 0.70710678f, splat(-3.9f)), splat(3.9f)), z = y * y;
    vec p = splat(2.0503876e-06f), q = splat(3.8230562e-05f);
    p = p * z + 0.00028745376f;
    q = q * z + 0.001181708f;
    p = p * z + 0.0038367766f;
    q = q * z + 0.015109006f;
    p = p * z + 0.05296661f;
    q = q * z + 0.11475729f;
    p = p * z + 0.19193886f;
    q = q * z + 0.50343317f;
    p = p * z + 1.128379f;
    q = q * z + 1.0f;
    vec half = 0.5f * x;
    return half + half * (y * p * reciprocal(q));
}

INLINE vec silu(vec x) { return x * reciprocal(exponential(-x) + 1.0f); }

#endif
