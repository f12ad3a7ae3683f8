"""Lists of what attends to what: shared tiles of the running sequences, and passes over prompts.

Ranges of keys begin at multiples of one number of tokens, so how a row's keys are cut does not
depend on what else is in the batch.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from restem_kernels.work import Work
from torch import Tensor

from restem_lightning.sampler.scheduler import Chunk
from restem_lightning.sampler.sequence import Segment, Sequence

RANGE_TOKENS = 512  # keys of one piece, about


def range_size(block_size: int) -> int:
    """Returns the keys of one piece at most: whole blocks."""
    return block_size * max(1, RANGE_TOKENS // block_size)


@dataclass(kw_only=True)
class TileList:
    """Tiles and their rows, as `restem_kernels.work.Work` wants them.

    Args:
        size: keys in a range.
        max_rows: rows in a tile at most.
        tiles: the seven columns of each tile.
        members: rows of the tiles.
    """

    size: int
    max_rows: int
    tiles: list[tuple[int, ...]] = field(default_factory=list)
    members: list[int] = field(default_factory=list)

    def num_ranges(self, segment: Segment) -> int:
        """Returns the pieces that a segment gives each of its rows."""
        return -(-len(segment.token_ids) // self.size)

    def num_before(self, segment: Segment) -> int:
        """Returns the pieces of the segments before a segment."""
        return sum(self.num_ranges(ancestor) for ancestor in segment.chain[:-1])

    def add(self, segment: Segment, rows: list[int]) -> None:
        """Lets rows attend to a segment, in tiles of about equal numbers of rows."""
        num_tiles = -(-len(rows) // self.max_rows)
        size = -(-len(rows) // num_tiles)
        num_before, length = self.num_before(segment), len(segment.token_ids)
        for first in range(0, len(rows), size):
            part = rows[first : first + size]
            place = len(self.members)
            self.members.extend(part)
            for piece, key in enumerate(range(0, length, self.size), num_before):
                last = min(key + self.size, length)
                self.tiles.append(
                    (place, len(part), segment.table, segment.start, key, last, piece)
                )


def shared_tiles(sequences: Iterable[Sequence], tiles: TileList) -> TileList:
    """Returns the tiles of running sequences over all segments of their prompts."""
    rows_behind: dict[Segment, list[int]] = defaultdict(list)
    for sequence in sequences:
        rows_behind[sequence.prompt].append(sequence.lane)
    rows_of: dict[Segment, list[int]] = defaultdict(list)
    for prompt, rows in rows_behind.items():
        for segment in prompt.chain:
            rows_of[segment].extend(rows)
    for segment, rows in rows_of.items():
        tiles.add(segment, rows)
    return tiles


@dataclass(kw_only=True)
class PrefillBatch:
    """One forward pass over parts of prompts.

    Args:
        token_ids: [T] int64.
        work: of the T rows.
        logit_rows: [R] int64, rows that end a prompt, padded with the first row.
        prompts: the prompts that these rows end.
    """

    token_ids: Tensor
    work: Work
    logit_rows: Tensor
    prompts: list[Segment]


def prefill_batch(
    chunks: list[Chunk],
    tiles: TileList,
    *,
    tables: Tensor,
    unused_table: int,
    num_rows: Callable[[int], int],
    to_device: Callable[[list, torch.dtype], Tensor],
) -> PrefillBatch:
    """Returns the tensors of a pass over parts of prompts.

    Args:
        chunks: not empty; parts of a preamble come before what follows it.
        tiles: an empty list with its sizes.
        tables: block tables.
        unused_table: the row of `tables` that unused rows write to.
        num_rows: rows of the pass and rows of logits for how many are needed: constant or from few
            values, so that products keep their shapes.
        to_device: makes a tensor of a list without waiting for the device.
    """
    token_ids, positions, own_tables, own_starts, num_shared = [], [], [], [], []
    logit_rows, prompts = [], []
    rows_of: dict[Segment, list[int]] = defaultdict(list)
    for chunk in chunks:
        segment, first, last = chunk.segment, chunk.first, chunk.last
        rows = range(len(token_ids), len(token_ids) + last - first)
        token_ids.extend(segment.token_ids[first:last])
        positions.extend(range(segment.start + first, segment.start + last))
        own_tables.extend([segment.table] * len(rows))
        own_starts.extend([segment.start] * len(rows))
        pieces = tiles.num_before(segment) + tiles.num_ranges(segment)
        num_shared.extend([pieces] * len(rows))
        for ancestor in segment.chain:
            rows_of[ancestor].extend(rows)
        if last == len(segment.token_ids) and not segment.is_preamble:
            logit_rows.append(rows[-1])
            prompts.append(segment)
    for segment, rows in rows_of.items():
        tiles.add(segment, rows)
    unused = num_rows(len(token_ids)) - len(token_ids)

    def tensor(values: list, fill: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return to_device(values + [fill] * unused, dtype)

    work = Work(
        tiles=to_device(tiles.tiles, torch.int32),
        num_tiles=to_device([len(tiles.tiles)], torch.int32),
        members=to_device(tiles.members, torch.int32),
        tables=tables,
        positions=tensor(positions, 0),
        own_tables=tensor(own_tables, unused_table),
        own_starts=tensor(own_starts, 0),
        num_shared=tensor(num_shared, 0),
        attend_own=False,
        split=tiles.size,
        num_pieces=max(num_shared),
    )
    wanted = logit_rows + [0] * (num_rows(len(logit_rows)) - len(logit_rows))
    return PrefillBatch(
        token_ids=tensor(token_ids, 0, torch.int64),
        work=work,
        logit_rows=to_device(wanted, torch.int64),
        prompts=prompts,
    )
