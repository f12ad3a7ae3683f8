"""Work: what each row of a forward pass attends to, and where its keys and values are written.

The keys of a row lie in *segments*: runs of tokens with a table of cache blocks each. A shared
segment (the few-shot preamble, a question) is attended to in *tiles*: up to some number of rows at
once, over a range of its keys. The row's own tokens, which nobody shares, are attended to row by
row, in ranges of `split` keys. Every tile and every range gives one *piece* of a row's result, and
the pieces are merged. One rule says which keys a row sees: key i of a segment that starts at
position s lies at position s + i, and a row sees the positions up to its own, with a window only
the last `window` of them.

Ranges never depend on what else is in the batch, so a row's result does not either.
"""

from dataclasses import dataclass

from torch import Tensor

DUMP_BLOCK = 0  # unused rows write to it; what they read is never used

# Columns of `Work.tiles`.
FIRST_MEMBER, NUM_MEMBERS, TABLE, START, FIRST_KEY, LAST_KEY, PIECE = range(7)


@dataclass(kw_only=True)
class Work:
    """The lists of one forward pass over T rows; every tensor is int32 and may hold more than used.

    Args:
        tiles: [n, 7], for each tile over a shared segment: where its rows begin in `members`, how
            many there are, the segment's row of `tables`, the position of the segment's first key,
            the range of keys first .. last-1 (counted within the segment), and the piece of its
            rows that it gives.
        num_tiles: [1], how many tiles there are.
        members: [*], rows of the batch, each tile's together.
        tables: [num_tables, num_blocks], cache blocks of each segment in order.
        positions: [T], of each row's token.
        own_tables: [T], the row of `tables` that each row's key and value are written to.
        own_starts: [T], position of the first key of that table.
        num_shared: [T], pieces that tiles give for each row: 0 .. num_shared-1.
        attend_own: whether rows attend to their own table too, up to themselves; these pieces come
            behind the shared ones. Without it (prefill) the tiles hold all that is to be seen.
        split: keys of an own piece at most.
        num_pieces: the most pieces that any row may have.
    """

    tiles: Tensor
    num_tiles: Tensor
    members: Tensor
    tables: Tensor
    positions: Tensor
    own_tables: Tensor
    own_starts: Tensor
    num_shared: Tensor
    attend_own: bool
    split: int
    num_pieces: int
