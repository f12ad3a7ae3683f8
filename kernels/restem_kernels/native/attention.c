/* Block attention over a work list.
 *
 * In a block of the cache keys lie word by word (attention.h), so a vector holds one word of LANES
 * keys, scores come out side by side, and nothing is transposed or added across lanes.
 *
 * Rows that see the same shared segments are attended for together, as many at once as fill the
 * registers (`plan`); then each sees its own keys. Keys are taken in chunks that begin at fixed
 * places of their segment; between chunks a row keeps the highest score, the sum of the weights and
 * the weighted values. Rows of a product never mix, and a key that a row does not see adds an exact
 * zero: its bits depend on nothing but itself.
 */
#include "attention.h"

enum { CHUNK = 128 };                 /* keys */
enum { FETCHED = 8 };                 /* blocks of a row that are brought near */
enum { SPAN = 32 };                   /* words added up at a time */
enum { WIDE = 2 * LANES };            /* keys or values side by side in one step of a product */
enum { FIRST_MEMBER, NUM_MEMBERS, TABLE, START, FIRST_KEY, LAST_KEY, PIECE, COLUMNS };

static int lesser(int a, int b) { return a < b ? a : b; }
static int greater(int a, int b) { return a > b ? a : b; }

/* Fills chains and order. */
void plan(const struct work *w)
{
    int T = w->num_rows, P = w->num_pieces, last[T], filled = 0;
    for (int i = 0; i < T * P; i++)
        w->chains[i] = -1;
    for (int row = 0; row < T; row++)
        last[row] = -1;
    for (int t = 0; t < w->num_tiles; t++) {
        const int32_t *tile = w->tiles + t * COLUMNS;
        for (int i = 0; i < tile[NUM_MEMBERS]; i++) {
            int row = w->members[tile[FIRST_MEMBER] + i];
            w->chains[row * P + tile[PIECE]] = t;
            last[row] = t;
        }
    }
    for (int row = 0; row < T; row++)
        if (last[row] < 0)
            w->order[filled++] = row;
    for (int t = 0; t < w->num_tiles; t++) {
        const int32_t *tile = w->tiles + t * COLUMNS;
        for (int i = 0; i < tile[NUM_MEMBERS]; i++) {
            int row = w->members[tile[FIRST_MEMBER] + i];
            if (last[row] == t)
                w->order[filled++] = row;
        }
    }
}

/* Whether two rows have tiles over the same keys. */
static int same_keys(const struct work *w, int a, int b)
{
    for (int piece = 0; piece < w->num_pieces; piece++) {
        int s = w->chains[a * w->num_pieces + piece], t = w->chains[b * w->num_pieces + piece];
        if (s == t)
            continue;
        if (s < 0 || t < 0)
            return 0;
        const int32_t *of_a = w->tiles + s * COLUMNS, *of_b = w->tiles + t * COLUMNS;
        for (int column = TABLE; column < PIECE; column++)
            if (of_a[column] != of_b[column])
                return 0;
    }
    return 1;
}

/* What is known of M query vectors, between chunks. */
struct state {
    int steps, padded;   /* words of a query; D rounded up to LANES */
    const word *queries; /* [M, steps] */
    const int *positions; /* [M] */
    float *highest;      /* [M], of the scores */
    float *total;        /* [M], of the weights */
    float *mixed;        /* [M, padded], weighted values */
};

struct settings {
    float scaling, softcap; /* softcap 0 for none */
    int window;
};

/* Writes v, or adds it where there has been something before. */
INLINE void add_to(float *to, vec v, int before)
{
    vec old;
    if (before) {
        memcpy(&old, to, sizeof old);
        v += old;
    }
    memcpy(to, &v, sizeof v);
}

/* scores[i][0 .. WIDE) = query i . keys, for m queries; sums of spans, since a single long one
 * loses digits. */
INLINE void score(
    const int m, const word *queries, int steps, const word *keys, int stride, float *scores,
    int score_stride)
{
    for (int first = 0; first < steps; first += SPAN) {
        vec low[MAX_ROWS], high[MAX_ROWS];
        UNROLL for (int i = 0; i < m; i++)
            low[i] = high[i] = (vec){0};
        for (int s = first; s < lesser(first + SPAN, steps); s++) {
            words a = load_words(keys + s * stride), b = load_words(keys + s * stride + LANES);
            UNROLL for (int i = 0; i < m; i++) {
                low[i] = add_product(low[i], queries[i * steps + s], a);
                high[i] = add_product(high[i], queries[i * steps + s], b);
            }
        }
        UNROLL for (int i = 0; i < m; i++) {
            float *to = scores + i * score_stride;
            add_to(to, low[i], first);
            add_to(to + LANES, high[i], first);
        }
    }
}

/* Words of count values from `values` on, of PER_WORD keys. */
INLINE words value_words(const number *const *values, int d, int count)
{
    words first = load_wide(values[0] + d, count);
#ifdef BFLOAT16
    return first | load_wide(values[1] + d, count) << 16;
#else
    return first;
#endif
}

/* mixed[i][0 .. n vectors) += weights i . values, for m queries; `count` values at most. */
INLINE void mix(
    const int m, const int n, int count, const word *weights, int weight_stride,
    const number *const *values, int first, int last, int d, float *mixed, int mixed_stride)
{
    vec sums[MAX_ROWS][2];
    UNROLL for (int i = 0; i < m; i++)
        UNROLL for (int v = 0; v < n; v++)
            memcpy(&sums[i][v], mixed + i * mixed_stride + d + v * LANES, sizeof(vec));
    for (int s = first; s < last; s++) {
        words of[2];
        UNROLL for (int v = 0; v < n; v++)
            of[v] = value_words(values + s * PER_WORD, d + v * LANES, count);
        UNROLL for (int i = 0; i < m; i++)
            UNROLL for (int v = 0; v < n; v++)
                sums[i][v] = add_product(sums[i][v], weights[i * weight_stride + s], of[v]);
    }
    UNROLL for (int i = 0; i < m; i++)
        UNROLL for (int v = 0; v < n; v++)
            memcpy(mixed + i * mixed_stride + d + v * LANES, &sums[i][v], sizeof(vec));
}

/* `mix` over all D values. */
INLINE void mix_all(
    const int m, const word *weights, int weight_stride, const number *const *values, int first,
    int last, int head_size, float *mixed, int mixed_stride)
{
    int d = 0;
    for (; d + WIDE <= head_size; d += WIDE)
        mix(m, 2, LANES, weights, weight_stride, values, first, last, d, mixed, mixed_stride);
    for (; d < head_size; d += LANES)
        mix(m, 1, head_size - d, weights, weight_stride, values, first, last, d, mixed,
            mixed_stride);
}

/* Calls CALL with m constant, for parts of M rows from `i` on. */
#define IN_PARTS(M, CALL)                              \
    for (int i = 0, m; i < (M); i += m) {              \
        m = (M)-i;                                     \
        if (MAX_ROWS == 12 && m >= 12) { m = 12; CALL(12); } \
        else if (m >= 6) { m = 6; CALL(6); }           \
        else if (m >= 4) { m = 4; CALL(4); }           \
        else if (m == 3) { CALL(3); }                  \
        else if (m == 2) { CALL(2); }                  \
        else { CALL(1); }                              \
    }

#define LOWEST -1e30f /* stands for -inf, with no NaN in differences */

/* tanh(x), for the bound of scores. */
INLINE vec tanh_of(vec x)
{
    vec size = larger(x, -x), square = x * x;
    vec near = x + x * square * (-0.333333287f + square * (0.133320672f + square * (-5.37397155e-2f
        + square * (2.06390887e-2f + square * -5.70498872e-3f))));
    vec far = 1.0f - 2.0f / (exp_of(size + size) + 1.0f);
    return choose(size < 0.625f, near, choose(x < 0.0f, -far, far));
}

static void bound(float *scores, int count, const struct settings *set)
{
    for (int k = 0; k < count; k += LANES) {
        vec x;
        memcpy(&x, scores + k, sizeof x);
        x = choose(x > LOWEST, set->softcap * tanh_of(x * set->scaling / set->softcap), x);
        memcpy(scores + k, &x, sizeof x);
    }
}

/* Turns the scores of a query into weights, of keys low .. high-1 and zeros for the others of
 * first .. last-1 (multiples of WIDE); returns the factor of what was mixed before. */
static float weigh(
    const struct state *st, int i, const struct settings *set, float *scores, word *weights,
    int low, int high, int first, int last)
{
    vec top = splat(LOWEST), sum = {0};
    float scale = set->scaling * 1.44269504f;
    for (int k = first; k < low; k++)
        scores[k] = LOWEST;
    for (int k = high; k < last; k++)
        scores[k] = LOWEST;
    if (set->softcap != 0.0f) {
        bound(scores + first, last - first, set);
        scale = 1.44269504f;
    }
    for (int k = first; k < last; k += LANES) {
        vec x;
        memcpy(&x, scores + k, sizeof x);
        top = larger(x, top);
    }
    float highest = max_of(top), before = st->highest[i];
    highest = highest > before ? highest : before;
    for (int k = first; k < last; k += LANES) {
        vec x;
        memcpy(&x, scores + k, sizeof x);
        x = exp2_of((x - highest) * scale);
        sum += x;
        store((number *)weights + k, x, LANES);
    }
    float factor = exp2_of(splat((before - highest) * scale))[0];
    st->highest[i] = highest;
    st->total[i] = st->total[i] * factor + sum_of(sum);
    return factor;
}

/* Rows whose own keys and values are still to be brought near, before they are needed. */
struct ahead {
    const struct work *w;
    const int32_t *rows;
    int count;
};

static void fetch(struct ahead *a, const struct cache *c, int head)
{
    if (a->count == 0 || !a->w->attend_own)
        return;
    int row = a->rows[--a->count], S = c->block_size;
    const int32_t *table = a->w->tables + (int64_t)a->w->own_tables[row] * a->w->table_width;
    int blocks = (a->w->positions[row] - a->w->own_starts[row]) / S + 1, size = S * c->head_size;
    for (int b = 0; b < blocks && b < FETCHED; b++) {
        int64_t place = ((int64_t)table[b] * c->num_key_heads + head) * size;
        for (int i = 0; i < size; i += 64 / (int)sizeof(number)) {
            __builtin_prefetch(c->keys + place + i, 0, 2);
            __builtin_prefetch(c->values + place + i, 0, 2);
        }
    }
}

/* Lets M queries attend to keys first .. last-1 of a table whose first key is at a position. */
static void attend(
    const struct cache *c, const struct settings *set, int head, int M, const struct state *st, struct ahead *next,
    const int32_t *table, int start, int from, int to)
{
    int S = c->block_size, D = c->head_size, oldest = st->positions[0], newest = oldest;
    static const number zeros[1024];
    float scores[MAX_ROWS][CHUNK + WIDE];
    word weights[MAX_ROWS][CHUNK / PER_WORD], spare[S % WIDE ? st->steps * WIDE : 1];
    const number *values[CHUNK + 1];
    for (int i = 1; i < M; i++) {
        oldest = lesser(oldest, st->positions[i]);
        newest = greater(newest, st->positions[i]);
    }
    for (int base = from; base < to; base += CHUNK) {
        /* Keys of the chunk that any row sees: low .. high-1. */
        int high = lesser(lesser(CHUNK, to - base), newest + 1 - start - base);
        int low = greater(0, oldest - set->window + 1 - start - base);
        if (low >= high)
            continue;
        fetch(next, c, head);
        int first = low / WIDE * WIDE, last = (high + WIDE - 1) / WIDE * WIDE, run;
        for (int k = first; k < high; k += run) {
            int slot = (base + k) % S;
            int64_t block = table[(base + k) / S];
            int64_t place = (block * c->num_key_heads + head) * S * D;
            const word *keys = (const word *)(c->keys + place) + slot;
            int stride = S;
            run = lesser(lesser(S - slot, WIDE), high - k);
            for (int j = 0; j < run; j++)
                values[k + j] = c->values + place + (slot + j) * D;
            if (S - slot < WIDE) {
                for (int s = 0; s < st->steps; s++)
                    memcpy(spare + s * WIDE, keys + s * S, (S - slot) * sizeof(word));
                keys = spare;
                stride = WIDE;
            }
#define SCORE(m) \
    score(m, st->queries + i * st->steps, st->steps, keys, stride, &scores[i][k], CHUNK + WIDE)
            IN_PARTS(M, SCORE)
        }
        values[high] = zeros;
        for (int i = 0; i < M; i++) {
            int up_to = st->positions[i] + 1 - start - base;
            int sees = greater(0, up_to - set->window), below = lesser(high, up_to);
            float factor = 1.0f;
            if (sees < below)
                factor = weigh(st, i, set, scores[i], weights[i], sees, below, first, last);
            else
                memset(weights[i], 0, sizeof weights[i]);
            if (factor != 1.0f)
                for (int d = 0; d < st->padded; d++)
                    st->mixed[i * st->padded + d] *= factor;
        }
#define MIX(m)                                                                               \
    mix_all(m, weights[i], CHUNK / PER_WORD, values, low / PER_WORD,                         \
        (high + PER_WORD - 1) / PER_WORD, D, st->mixed + i * st->padded, st->padded)
        IN_PARTS(M, MIX)
    }
}

/* Attends for `count` rows of the same tiles and `width` query heads from `first` on. */
static void attend_rows(
    const struct work *w, const struct cache *c, const struct settings *set, const int32_t *rows,
    int count, int head, int first, int width, const number *queries, int64_t query_stride,
    int64_t head_stride, number *out, int num_heads)
{
    int D = c->head_size, steps = D / PER_WORD, padded = (D + LANES - 1) / LANES * LANES;
    int M = count * width, positions[MAX_ROWS];
    word packed[MAX_ROWS * steps];
    float highest[MAX_ROWS], total[MAX_ROWS], mixed[MAX_ROWS * padded];
    memset(mixed, 0, sizeof mixed);
    for (int i = 0; i < M; i++) {
        int row = rows[i / width];
        memcpy(packed + i * steps,
            queries + row * query_stride + (first + i % width) * head_stride, steps * 4);
        positions[i] = w->positions[row];
        highest[i] = LOWEST;
        total[i] = 0.0f;
    }
    struct state all = {steps, padded, packed, positions, highest, total, mixed};
    struct ahead next = {w, rows, count};
    const int32_t *chain = w->chains + rows[0] * w->num_pieces;
    for (int piece = 0; piece < w->num_pieces; piece++)
        if (chain[piece] >= 0) {
            const int32_t *t = w->tiles + chain[piece] * COLUMNS;
            const int32_t *table = w->tables + (int64_t)t[TABLE] * w->table_width;
            attend(c, set, head, M, &all, &next, table, t[START], t[FIRST_KEY], t[LAST_KEY]);
        }
    for (int r = 0; r < count && w->attend_own; r++) {
        const int32_t *table = w->tables + (int64_t)w->own_tables[rows[r]] * w->table_width;
        int i = r * width, start = w->own_starts[rows[r]];
        struct state own = {steps, padded, packed + i * steps, positions + i, highest + i,
            total + i, mixed + i * padded};
        if (table[0] != 0) /* the dump block: a row that is not in use */
            attend(c, set, head, width, &own, &next, table, start, 0, positions[i] + 1 - start);
    }
    for (int i = 0; i < M; i++) {
        number *to = out + ((int64_t)rows[i / width] * num_heads + first + i % width) * D;
        float scale = total[i] > 0.0f ? 1.0f / total[i] : 0.0f;
        for (int d = 0; d < D; d += LANES) {
            vec x;
            memcpy(&x, mixed + i * padded + d, sizeof x);
            store(to + d, x * scale, D - d);
        }
    }
}

/* Block attention: queries [T, H, D] with these strides, out [T, H, D] contiguous. */
void block_attention(
    const struct work *w, number *key_cache, number *value_cache, int K, int S, int D,
    const number *queries, int64_t query_stride, int64_t head_stride, number *out, int num_heads,
    float scaling, float softcap, int window, int threads)
{
    struct cache c = {key_cache, value_cache, K, S, D};
    struct settings set = {scaling, softcap, window};
    int T = w->num_rows, group = num_heads / K;
    int width = lesser(group, MAX_ROWS), most = MAX_ROWS / width, parts = (group + width - 1) / width;
    int32_t firsts[T + 1], count = 0;
    for (int r = 0; r < T; r++)
        if (r == 0 || r - firsts[count - 1] == most
            || !same_keys(w, w->order[firsts[count - 1]], w->order[r]))
            firsts[count++] = r;
    firsts[count] = T;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int item = 0; item < count * K * parts; item++) {
        int b = item % count, part = item / count % parts, head = item / count / parts;
        int first = part * width;
        attend_rows(w, &c, &set, w->order + firsts[b], firsts[b + 1] - firsts[b], head,
            head * group + first, lesser(width, group - first), queries, query_stride, head_stride,
            out, num_heads);
    }
}
