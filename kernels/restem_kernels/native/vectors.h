/* Vectors, and the numbers of a tensor as they lie in memory.
 *
 * Compiled once for float32 and once (-DBFLOAT16) for bfloat16. Vectors are GCC's and clang's own,
 * so any processor will do; intrinsics are used for bfloat16 where AVX-512 has it. A `word` is 32
 * bits of a tensor: one float32, or two neighbours in bfloat16. Products of bfloat16 take words, so
 * both types share the loops.
 */
#ifndef VECTORS_H
#define VECTORS_H

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
#if LANES == 16 || defined(__aarch64__)
#define MAX_ROWS 12 /* of a product's tile: with two vectors each, all but a few of 32 registers */
#else
#define MAX_ROWS 6 /* of 16 registers */
#endif
#if LANES == 16
#include <immintrin.h>
#if defined(BFLOAT16) && defined(__AVX512BF16__)
#define BFLOAT16_DOTS
#endif
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint32_t word;

#ifdef BFLOAT16
typedef uint16_t number;
#define PER_WORD 2
#else
typedef float number;
#define PER_WORD 1
#endif

typedef number numbers __attribute__((vector_size(sizeof(number) * LANES)));

INLINE vec splat(float x) { return x - (vec){0}; }

INLINE words load_words(const void *from)
{
    words v;
    memcpy(&v, from, sizeof v);
    return v;
}

INLINE float to_float(number x)
{
#ifdef BFLOAT16
    word bits = (word)x << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
#else
    return x;
#endif
}

/* Converts LANES numbers. */
INLINE vec widen(numbers v)
{
#if defined(BFLOAT16) && LANES == 16 /* what the compiler makes of the other is slow */
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)v), 16);
#elif defined(BFLOAT16)
    return (vec)(__builtin_convertvector(v, words) << 16);
#else
    return v;
#endif
}

/* Loads the first count of LANES numbers, zeros for the others, each in the low half of a word. */
INLINE words load_wide(const number *from, int count)
{
    numbers v = {0};
    if (count >= LANES)
        memcpy(&v, from, sizeof v);
    else
        for (int i = 0; i < count; i++)
            v[i] = from[i];
#if defined(BFLOAT16) && LANES == 16 /* what the compiler makes of the other is slow */
    return (words)_mm512_cvtepu16_epi32((__m256i)v);
#elif defined(BFLOAT16)
    return __builtin_convertvector(v, words);
#else
    return (words)v;
#endif
}

/* Rounds to the nearest number, ties to even; NaN stays NaN. */
INLINE numbers narrow(vec v)
{
#ifdef BFLOAT16_DOTS
    return (numbers)_mm512_cvtneps_pbh((__m512)v);
#elif defined(BFLOAT16)
    words bits = (words)v, nan = (words)(v != v);
    words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector((rounded & ~nan) | (0x7fc0 & nan), numbers);
#else
    return v;
#endif
}

/* Rounds to a number and back. */
INLINE vec rounded(vec v) { return widen(narrow(v)); }

/* Loads the first count of LANES numbers, zeros for the others. */
INLINE vec load(const number *from, int count)
{
    numbers v = {0};
    if (count >= LANES)
        memcpy(&v, from, sizeof v);
    else
        for (int i = 0; i < count; i++)
            v[i] = from[i];
    return widen(v);
}

INLINE void store(number *to, vec v, int count)
{
    numbers out = narrow(v);
    if (count >= LANES)
        memcpy(to, &out, sizeof out);
    else
        for (int i = 0; i < count; i++)
            to[i] = out[i];
}

INLINE float sum_of(vec v)
{
    float part[LANES];
    memcpy(part, &v, sizeof v);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++)
            part[i] += part[i + half];
    return part[0];
}

INLINE vec choose(ints mask, vec yes, vec no)
{
    return (vec)(((ints)yes & mask) | ((ints)no & ~mask));
}

INLINE vec larger(vec a, vec b)
{
#if LANES == 16
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return choose(a > b, a, b);
#endif
}

INLINE vec smaller(vec a, vec b) { return -larger(-a, -b); }

INLINE float max_of(vec v)
{
    float part[LANES];
    memcpy(part, &v, sizeof v);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++)
            part[i] = part[i] > part[i + half] ? part[i] : part[i + half];
    return part[0];
}

#define ROUNDS_OFF 12582912.0f /* 1.5 * 2**23: what is added to it comes out as an integer */

/* 2**(n + r) for shifted = ROUNDS_OFF + n and |r| <= 0.5, within 2 units in the last place. */
INLINE vec power_of_two(vec shifted, vec r)
{
    vec series = 1.0f + r * (0.693147182f + r * (0.240226507f + r * (5.55041e-2f
        + r * (9.61812911e-3f + r * (1.33335581e-3f + r * 1.54035304e-4f)))));
    return (vec)((words)series + ((words)shifted << 23));
}

/* 2**x for x up to 127: exactly 1 at 0, exactly 0 below -126; NaN stays NaN. */
INLINE vec exp2_of(vec x)
{
    vec shifted = x + ROUNDS_OFF;
    vec power = power_of_two(shifted, x - (shifted - ROUNDS_OFF));
    return (vec)((words)power & ~(words)(x < -126.0f));
}

/* e**x for x from -87 to 88, clamped to that. */
INLINE vec exp_of(vec x)
{
    vec inside = smaller(larger(x, splat(-87.0f)), splat(88.0f));
    vec shifted = inside * 1.44269502f + ROUNDS_OFF, n = shifted - ROUNDS_OFF;
    return power_of_two(shifted, (inside * 1.44269502f - n) + inside * 1.92596303e-8f);
}

/* acc + q * k for each lane; of bfloat16 both neighbours' products. */
INLINE vec add_product(vec acc, word q, words k)
{
#ifdef BFLOAT16_DOTS
    return (vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32((int)q), (__m512bh)k);
#elif defined(BFLOAT16)
    words pair = q + (words){0};
    acc += (vec)(pair << 16) * (vec)(k << 16);
    return acc + (vec)(pair & 0xffff0000u) * (vec)(k & 0xffff0000u);
#else
    return acc + (vec)(q + (words){0}) * (vec)k;
#endif
}

#endif
