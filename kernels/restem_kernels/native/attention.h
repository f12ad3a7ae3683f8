/* The work list and the cache. */
#ifndef ATTENTION_H
#define ATTENTION_H

#include "vectors.h"

struct work { /* see work.py; int32 tensors */
    const int32_t *tiles, *members, *tables, *positions, *own_tables, *own_starts;
    int32_t num_tiles, table_width, num_rows, attend_own, num_pieces;
    int32_t *chains; /* [T, num_pieces], the row's tiles by piece, -1 for none */
    int32_t *order;  /* [T], rows of the same tiles one after the other */
};

/* Of one layer: [n, K, S, D]. In a block values lie so, but keys word by word:
 * [D / PER_WORD, S, PER_WORD]. */
struct cache {
    number *keys, *values;
    int32_t num_key_heads, block_size, head_size;
};

#endif
