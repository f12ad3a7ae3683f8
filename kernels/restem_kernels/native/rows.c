/* What goes row by row: norms, rotation and write to the cache, gated activation.
 *
 * Each step is rounded to the numbers' type where the definition in reference.py rounds it.
 */
#include "attention.h"
#include <math.h>

enum { SPAN = 16 * LANES };

/* Writes x, of n numbers, normalized and times weight. */
static void norm(number *to, const number *x, const number *weight, int n, float eps)
{
    vec sum = {0};
    for (int first = 0; first < n; first += SPAN) { /* a single long sum loses digits */
        vec part = {0};
        int last = n - first < SPAN ? n : first + SPAN;
        for (int i = first; i < last; i += LANES) {
            vec v = load(x + i, n - i);
            part += v * v;
        }
        sum += part;
    }
    float scale = 1.0f / sqrtf(sum_of(sum) / n + eps);
    for (int i = 0; i < n; i += LANES)
        store(to + i, rounded(load(x + i, n - i) * scale) * load(weight + i, n - i), n - i);
}

/* x and residual (null for none) [T, n] with these strides; normed and total [T, n]. */
void add_rms_norm(
    const number *x, int64_t x_stride, const number *residual, int64_t residual_stride,
    const number *weight, number *normed, number *total, int num_rows, int n, float eps,
    int threads)
{
#pragma omp parallel for num_threads(threads)
    for (int row = 0; row < num_rows; row++) {
        const number *a = x + row * x_stride;
        if (residual) {
            const number *b = residual + row * residual_stride;
            number *sum = total + (int64_t)row * n;
            for (int i = 0; i < n; i += LANES)
                store(sum + i, load(a + i, n - i) + load(b + i, n - i), n - i);
            a = sum;
        }
        norm(normed + (int64_t)row * n, a, weight, n, eps);
    }
}

/* gate_up [T, 2 n] -> out [T, n]. */
void gated_silu(
    const number *gate_up, int64_t stride, number *out, int num_rows, int n, int threads)
{
#pragma omp parallel for num_threads(threads)
    for (int row = 0; row < num_rows; row++) {
        const number *gate = gate_up + row * stride, *up = gate + n;
        for (int i = 0; i < n; i += LANES) {
            vec x = load(gate + i, n - i);
            vec silu = rounded(x / (1.0f + exp_of(-x)));
            store(out + (int64_t)row * n + i, silu * load(up + i, n - i), n - i);
        }
    }
}

/* Rotates a head; cosines and sines of D / 2 pairs. */
static void rotate(number *to, const number *x, const number *cosines, const number *sines, int D)
{
    int half = D / 2;
    for (int d = 0; d < half; d += LANES) {
        int count = half - d;
        vec low = load(x + d, count), high = load(x + half + d, count);
        vec c = load(cosines + d, count), s = load(sines + d, count);
        store(to + d, rounded(low * c) - rounded(high * s), count);
        store(to + half + d, rounded(high * c) + rounded(low * s), count);
    }
}

/* Writes one key and one value of all heads of a row; both [K, D], all numbers side by side. */
static void write_row(
    const struct work *w, const struct cache *c, int row, const number *key, const number *value)
{
    int S = c->block_size, D = c->head_size, index = w->positions[row] - w->own_starts[row];
    int64_t block = w->tables[(int64_t)w->own_tables[row] * w->table_width + index / S];
    for (int head = 0; head < c->num_key_heads; head++) {
        int64_t place = (block * c->num_key_heads + head) * S * D;
        word *to = (word *)(c->keys + place) + index % S;
        for (int d = 0; d < D / PER_WORD; d++)
            memcpy(to + d * S, key + head * D + d * PER_WORD, 4);
        memcpy(c->values + place + index % S * D, value + head * D, D * sizeof(number));
    }
}

/* Writes the keys and values of all rows; strides in numbers, D of a head side by side. */
void write_kv(
    const struct work *w, number *key_cache, number *value_cache, int K, int S, int D,
    const number *keys, int64_t key_stride, int64_t key_head_stride, const number *values,
    int64_t value_stride, int64_t value_head_stride)
{
    struct cache c = {key_cache, value_cache, K, S, D};
    number key[K * D], value[K * D];
    for (int row = 0; row < w->num_rows; row++) {
        for (int head = 0; head < K; head++) {
            memcpy(key + head * D, keys + row * key_stride + head * key_head_stride,
                D * sizeof(number));
            memcpy(value + head * D, values + row * value_stride + head * value_head_stride,
                D * sizeof(number));
        }
        write_row(w, &c, row, key, value);
    }
}

/* qkv [T, (H + 2 K) D] -> out [T, H, D] and the cache. Norms of heads may be null. */
void rotate_and_write(
    const struct work *w, number *key_cache, number *value_cache, int K, int S, int D,
    const number *qkv, int64_t stride, const number *cosines, const number *sines,
    const number *q_norm, const number *k_norm, float eps, number *out, int num_heads, int threads)
{
    struct cache c = {key_cache, value_cache, K, S, D};
#pragma omp parallel for num_threads(threads)
    for (int row = 0; row < w->num_rows; row++) {
        const number *x = qkv + row * stride;
        int64_t place = (int64_t)w->positions[row] * D;
        number *queries = out + (int64_t)row * num_heads * D, keys[K * D], normed[D];
        for (int head = 0; head < num_heads + K; head++, x += D) {
            int is_key = head >= num_heads;
            const number *from = x, *weight = is_key ? k_norm : q_norm;
            if (weight) {
                norm(normed, x, weight, D, eps);
                from = normed;
            }
            number *to = is_key ? keys + (head - num_heads) * D : queries + head * D;
            rotate(to, from, cosines + place, sines + place, D);
        }
        write_row(w, &c, row, keys, x);
    }
}
