"""Turns a scheduler's step into the tensors of one forward pass.

Shape legend: T rows (tokens) of the pass, g tiles, m rows of a tile, n blocks of a tile, P the most
tiles that any row is in.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from restem_lightning.sampler.scheduler import Step
from restem_lightning.sampler.sequence import Segment, Sequence

TILE_ROWS = 16


@dataclass(kw_only=True)
class Tiles:
    """Groups of rows that attend to the same blocks.

    Args:
        rows: [g, m] int64, T in unused places.
        blocks: [g, n] int64, or a slice of g blocks that lie together in the cache (n = 1).
        num_keys: [g, m] int64, keys of these blocks that the row may see.
        first_position: [g] int64, position of the first key.
    """

    rows: Tensor
    blocks: Tensor | slice
    num_keys: Tensor
    first_position: Tensor


@dataclass(kw_only=True)
class Batch:
    """Everything that one forward pass needs.

    Args:
        token_ids: [T] int64.
        positions: [T] int64.
        write_blocks: [R] int64, block that each of the R used rows is written to.
        write_offsets: [R] int64.
        tiles: over shared blocks, prompts being computed and private blocks (tiles of one row).
        pieces: [T, P] int64, for each row its places in the concatenation of all tiles' rows; the
            place behind the last one where a row has fewer.
        logit_rows: rows whose logits are wanted, in the order of outputs.
        outputs: the sequence or prompt segment that each of these rows belongs to, sequences first.
        num_rows: T.
    """

    token_ids: Tensor
    positions: Tensor
    write_blocks: Tensor
    write_offsets: Tensor
    tiles: list[Tiles]
    pieces: Tensor
    logit_rows: list[int]
    outputs: list[Sequence | Segment]
    num_rows: int


class _Builder:
    """Collects rows as lists; `finish` makes the tensors."""

    def __init__(self, block_size: int):
        self.block_size = block_size
        self.token_ids, self.positions, self.blocks, self.offsets = [], [], [], []
        self.rows_of_segment: dict[Segment, list[int]] = defaultdict(list)
        # By rows and blocks of a tile: its rows, blocks, keys of each row, first position.
        self.tiles: dict[tuple[int, int], list[tuple]] = defaultdict(list)
        self.private: list[tuple[int, int, int, int]] = []  # block, row, keys, first position
        self.logit_rows: list[int] = []
        self.outputs: list[Sequence | Segment] = []

    def add_row(self, token_id: int, position: int, block: int, offset: int) -> int:
        self.token_ids.append(token_id)
        self.positions.append(position)
        self.blocks.append(block)
        self.offsets.append(offset)
        return len(self.token_ids) - 1

    def add_decode(self, sequence: Sequence, first: int, last: int) -> None:
        """Adds a sequence's own tokens first .. last-1, each attending to those up to itself."""
        size, start = self.block_size, sequence.prompt.end
        for index in range(first, last):
            block, offset = divmod(index, size)
            row = self.add_row(
                sequence.token_ids[index], start + index, sequence.blocks[block], offset
            )
            for segment in sequence.prompt.chain:
                self.rows_of_segment[segment].append(row)
            for number in range(block + 1):
                keys = min(size, index + 1 - number * size)
                self.private.append((sequence.blocks[number], row, keys, start + number * size))
        if last == len(sequence.token_ids):
            self.logit_rows.append(row)
            self.outputs.append(sequence)

    def add_prefill(self, segment: Segment, number: int) -> None:
        """Adds one block of a prompt, attending causally to the segment's blocks up to itself."""
        size, first = self.block_size, number * self.block_size
        tokens = segment.token_ids[first : first + size]
        rows = [
            self.add_row(token, segment.start + first + offset, segment.blocks[number], offset)
            for offset, token in enumerate(tokens)
        ]
        keys = range(first + 1, first + len(tokens) + 1)
        self.add_tile(rows, segment.blocks[: number + 1], keys, segment.start, size)
        if segment.parent:
            for ancestor in segment.parent.chain:
                self.rows_of_segment[ancestor].extend(rows)
        if first + len(tokens) == len(segment.token_ids) and not segment.is_preamble:
            self.logit_rows.append(rows[-1])
            self.outputs.append(segment)

    def add_shared(self, num_rows: int) -> None:
        """Adds the tiles of rows that attend to whole segments."""
        for segment, rows in self.rows_of_segment.items():
            size = num_rows if segment.is_preamble else TILE_ROWS
            keys = [len(segment.token_ids)] * size
            for first in range(0, len(rows), size):
                tile = rows[first : first + size]
                self.add_tile(tile, segment.blocks, keys[: len(tile)], segment.start, size)

    def add_tile(self, rows, blocks, keys, first_position: int, size: int) -> None:
        """Adds a tile of size rows; those that it does not have see no key."""
        unused = size - len(rows)
        tile = ([*rows, *[-1] * unused], blocks, [*keys, *[0] * unused], first_position)
        self.tiles[size, len(blocks)].append(tile)

    def finish(self, num_rows: int, tensor: Callable[[list], Tensor]) -> Batch:
        """Returns the batch of num_rows rows."""
        self.add_shared(num_rows)
        pieces: list[list[int]] = [[] for _ in range(num_rows)]
        tile_sets, place = [], 0
        # Sorted, as the order of a row's pieces must not depend on the other rows.
        for _, tiles in sorted(self.tiles.items(), key=lambda item: item[0]):
            rows, blocks, keys, firsts = (list(column) for column in zip(*tiles, strict=True))
            tile_sets.append(_tiles(rows, tensor(blocks), keys, firsts, num_rows, tensor))
            for row in chain.from_iterable(rows):
                if row >= 0:
                    pieces[row].append(place)
                place += 1
        if self.private:
            private, slots = self._private_tiles(num_rows, tensor)
            tile_sets.append(private)
            for slot, (_, row, *_) in zip(slots, self.private, strict=True):
                pieces[row].append(place + slot)
            place += len(private.rows)
        width = max(map(len, pieces))
        padding = [0] * (num_rows - len(self.token_ids))
        return Batch(
            token_ids=tensor(self.token_ids + padding),
            positions=tensor(self.positions + padding),
            write_blocks=tensor(self.blocks),
            write_offsets=tensor(self.offsets),
            tiles=tile_sets,
            pieces=tensor([row + [place] * (width - len(row)) for row in pieces]),
            logit_rows=self.logit_rows,
            outputs=self.outputs,
            num_rows=num_rows,
        )

    def _private_tiles(
        self, num_rows: int, tensor: Callable[[list], Tensor]
    ) -> tuple[Tiles, list[int]]:
        """Returns tiles of one row and one block, and the tile of each entry of `private`.

        Where the blocks lie close, the tiles are in the order of the cache and need no gather.
        """
        blocks = [block for block, *_ in self.private]
        low, high = min(blocks), max(blocks) + 1
        if len(set(blocks)) == len(blocks) and high - low <= 2 * len(blocks):
            slots = [block - low for block in blocks]
            place: Tensor | slice = slice(low, high)
        else:
            slots = list(range(len(blocks)))
            place = tensor([[block] for block in blocks])
        entries: list[tuple[int, int, int]] = [(-1, 0, 0)] * (max(slots) + 1)
        for slot, (_, *entry) in zip(slots, self.private, strict=True):
            entries[slot] = tuple(entry)
        rows, keys, firsts = zip(*entries, strict=True)
        column = [[row] for row in rows]
        return _tiles(column, place, [[num] for num in keys], firsts, num_rows, tensor), slots


def _tiles(rows, blocks, keys, firsts, num_rows: int, tensor) -> Tiles:
    """Returns tiles made of lists; -1 stands for an unused row."""
    return Tiles(
        rows=tensor(rows).remainder_(num_rows + 1),
        blocks=blocks,
        num_keys=tensor(keys),
        first_position=tensor(firsts),
    )


def build_batch(step: Step, *, block_size: int, pad_to: int, device: torch.device) -> Batch:
    """Returns the tensors of a step.

    Args:
        step: from the scheduler; not empty.
        block_size: tokens in a cache block.
        pad_to: rows of the pass at least (0: as many as needed). A constant number of rows keeps
            every matrix product in the same shape, hence every row's result the same bits.
        device: where the tensors go.
    """
    builder = _Builder(block_size)
    for sequence, first, last in step.decode:
        builder.add_decode(sequence, first, last)
    for segment, number in step.prefill:
        builder.add_prefill(segment, number)
    return builder.finish(
        max(len(builder.token_ids), pad_to),
        lambda values: torch.tensor(values, dtype=torch.int64, device=device),
    )
