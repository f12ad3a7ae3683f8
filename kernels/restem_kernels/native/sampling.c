/* The largest logits of each row, and what its log-softmax needs. */
#include "vectors.h"
#include <math.h>

enum { GROUP = 64, SPAN = 32 * LANES, FOUND = 4096 };

/* The k-th largest of n values, 1 <= k <= n; their order changes. */
static float kth_largest(float *x, int n, int k)
{
    int low = 0, high = n - 1, target = k - 1;
    while (low < high) {
        float pivot = x[(low + high) / 2];
        int i = low, j = high;
        while (i <= j) {
            while (x[i] > pivot)
                i++;
            while (x[j] < pivot)
                j--;
            if (i <= j) {
                float kept = x[i];
                x[i++] = x[j];
                x[j--] = kept;
            }
        }
        if (target <= j)
            high = j;
        else if (target >= i)
            low = i;
        else
            return x[target];
    }
    return x[target];
}

/* LANES logits from i on of n, -inf beyond. */
INLINE vec logits_at(const number *x, int i, int n)
{
    vec v = load(x + i, n - i);
    if (__builtin_expect(n - i < LANES, 0))
        for (int j = n - i; j < LANES; j++)
            v[j] = -INFINITY;
    return v;
}

/* The logarithm of the sum of exponentials; the sums of spans are added in double. */
static float log_sum_exp(const number *x, int n, float highest)
{
    double total = 0.0;
    for (int first = 0; first < n; first += SPAN) {
        vec sum = {0};
        int last = n - first < SPAN ? n : first + SPAN;
        for (int i = first; i < last; i += LANES)
            sum += exp2_of((logits_at(x, i, n) - highest) * 1.44269504f);
        total += sum_of(sum);
    }
    return highest + (float)log(total);
}

/* Fills, for each row of logits [B, V], values and ids [B, C] with the logits that are at least
 * the k-th largest, ties too, by token, the rest with -inf; counts [B] says how many there are, -1
 * if they are too many; normalizers [B] are the logarithms of the sums of all exponentials.
 *
 * k of the maxima of groups of tokens are at least the k-th largest of these maxima: only the few
 * logits that are, too, need a closer look.
 */
void top_logits(
    const number *logits, int64_t stride, int num_rows, int V, int k, int C, float *values,
    int64_t *ids, int32_t *counts, float *normalizers, int threads)
{
    int groups = (V + GROUP - 1) / GROUP;
#pragma omp parallel for num_threads(threads)
    for (int row = 0; row < num_rows; row++) {
        const number *x = logits + row * stride;
        float maxima[groups], copy[groups], found[FOUND], again[FOUND], highest = -INFINITY;
        int token[FOUND], n = 0, kept = 0;
        for (int g = 0; g < groups; g++) {
            vec top = splat(-INFINITY);
            for (int i = g * GROUP; i < V && i < (g + 1) * GROUP; i += LANES)
                top = larger(top, logits_at(x, i, V));
            copy[g] = maxima[g] = max_of(top);
            highest = maxima[g] > highest ? maxima[g] : highest;
        }
        float bound = k <= groups ? kth_largest(copy, groups, k) : -INFINITY;
        for (int g = 0; g < groups && n >= 0; g++)
            for (int i = g * GROUP; maxima[g] >= bound && i < V && i < (g + 1) * GROUP; i++) {
                float value = to_float(x[i]);
                if (value < bound)
                    continue;
                if (n == FOUND) {
                    n = -1;
                    break;
                }
                found[n] = again[n] = value;
                token[n++] = i;
            }
        if (n > k)
            bound = kth_largest(again, n, k);
        for (int i = 0; i < n && kept >= 0; i++)
            if (found[i] >= bound) {
                if (kept == C) {
                    kept = -1;
                    break;
                }
                values[(int64_t)row * C + kept] = found[i];
                ids[(int64_t)row * C + kept++] = token[i];
            }
        counts[row] = n < 0 ? -1 : kept;
        for (int i = kept < 0 ? C : kept; i < C; i++) {
            values[(int64_t)row * C + i] = -INFINITY;
            ids[(int64_t)row * C + i] = 0;
        }
        normalizers[row] = log_sum_exp(x, V, highest);
    }
}
