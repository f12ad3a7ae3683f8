"""Turns a scheduler's step into the tensors of one forward pass.

Shape legend: T rows (tokens) of the pass, g tiles, m rows of a tile, n blocks of a tile, W pairs of
a private block and a row, p the most private blocks of any row.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from restem_lightning.sampler.scheduler import Step
from restem_lightning.sampler.sequence import Segment, Sequence

NUM_LEVELS = 3  # what a row attends to: the preamble, the rest of its prompt, its own tokens
TILE_ROWS = 16


@dataclass(kw_only=True)
class SharedWork:
    """Tiles of rows that attend to the same blocks, as matrix-matrix products.

    Args:
        level: which partial result of the rows this is.
        rows: [g, m] int64, T in unused places.
        blocks: [g, n] int64.
        num_keys: [g, m] int64, keys of these blocks that the row may see.
        first_position: [g] int64, position of the first key.
    """

    level: int
    rows: Tensor
    blocks: Tensor
    num_keys: Tensor
    first_position: Tensor


@dataclass(kw_only=True)
class PrivateWork:
    """Pairs of one block and one row: the tokens that only one sequence attends to.

    Args:
        blocks: where the W blocks lie in the cache: a slice if they lie together, else [W] int64.
        rows: [W] int64, T for a block that no row attends to.
        num_keys: [W] int64.
        first_position: [W] int64.
        table: [D, p] int64, for each decoded row its pairs, W in unused places.
        table_rows: [D] int64, the rows of the table.
    """

    blocks: slice | Tensor
    rows: Tensor
    num_keys: Tensor
    first_position: Tensor
    table: Tensor
    table_rows: Tensor


@dataclass(kw_only=True)
class Batch:
    """Everything that one forward pass needs.

    Args:
        token_ids: [T] int64.
        positions: [T] int64.
        write_blocks: [R] int64, block that each of the R used rows is written to.
        write_offsets: [R] int64.
        shared: tiles over shared blocks and over prompts being computed.
        private: pairs over private blocks, None if no sequence is decoded.
        logit_rows: rows whose logits are wanted, in the order of outputs.
        outputs: the sequence or prompt segment that each of these rows belongs to.
        num_rows: T.
    """

    token_ids: Tensor
    positions: Tensor
    write_blocks: Tensor
    write_offsets: Tensor
    shared: list[SharedWork]
    private: PrivateWork | None
    logit_rows: list[int]
    outputs: list[Sequence | Segment]
    num_rows: int


class _Builder:
    """Collects rows as lists; `finish` makes the tensors."""

    def __init__(self, block_size: int):
        self.block_size = block_size
        self.token_ids, self.positions, self.blocks, self.offsets = [], [], [], []
        self.pairs: list[tuple[int, int, int, int]] = []  # block, row, keys, first position
        self.pairs_of_row: list[tuple[int, list[int]]] = []
        self.rows_of_segment: dict[Segment, list[int]] = defaultdict(list)
        self.tiles: dict[tuple[int, int, int], list] = defaultdict(list)  # level, rows, blocks
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
            pairs = []
            for number in range(block + 1):
                keys = min(size, index + 1 - number * size)
                pairs.append(len(self.pairs))
                self.pairs.append((sequence.blocks[number], row, keys, start + number * size))
            self.pairs_of_row.append((row, pairs))
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
        keys = [first + offset + 1 for offset in range(size)]
        self.tiles[NUM_LEVELS - 1, size, number + 1].append(
            (rows, segment.blocks[: number + 1], keys, segment.start)
        )
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
            level = len(segment.chain) - 1
            length = len(segment.token_ids)
            for first in range(0, len(rows), size):
                tile = rows[first : first + size]
                keys = [length] * size
                self.tiles[level, size, len(segment.blocks)].append(
                    (tile, segment.blocks, keys, segment.start)
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
    used = len(builder.token_ids)
    num_rows = max(used, pad_to)
    builder.add_shared(num_rows)

    def tensor(values) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    padding = [0] * (num_rows - used)
    shared = []
    for (level, size, _), tiles in builder.tiles.items():
        shared.append(
            SharedWork(
                level=level,
                rows=tensor([rows + [num_rows] * (size - len(rows)) for rows, *_ in tiles]),
                blocks=tensor([blocks for _, blocks, _, _ in tiles]),
                num_keys=tensor([keys for _, _, keys, _ in tiles]),
                first_position=tensor([start for *_, start in tiles]),
            )
        )
    return Batch(
        token_ids=tensor(builder.token_ids + padding),
        positions=tensor(builder.positions + padding),
        write_blocks=tensor(builder.blocks),
        write_offsets=tensor(builder.offsets),
        shared=shared,
        private=_private_work(builder, num_rows, tensor) if builder.pairs else None,
        logit_rows=builder.logit_rows,
        outputs=builder.outputs,
        num_rows=num_rows,
    )


def _private_work(builder: _Builder, num_rows: int, tensor) -> PrivateWork:
    """Returns the pairs, laid out like the cache where each block has one row and they lie together."""
    pairs = builder.pairs
    blocks = [block for block, *_ in pairs]
    low, high = min(blocks), max(blocks) + 1
    place: slice | Tensor
    if len(set(blocks)) == len(blocks) and high - low <= 2 * len(blocks):
        slots: list[tuple[int, int, int]] = [(num_rows, 0, 0)] * (high - low)
        for block, *rest in pairs:
            slots[block - low] = tuple(rest)
        index_of = [block - low for block in blocks]
        place = slice(low, high)
    else:
        slots = [tuple(rest) for _, *rest in pairs]
        index_of = list(range(len(pairs)))
        place = tensor(blocks)
    width = max(len(indices) for _, indices in builder.pairs_of_row)
    unused = len(slots)
    return PrivateWork(
        blocks=place,
        rows=tensor([row for row, _, _ in slots]),
        num_keys=tensor([keys for _, keys, _ in slots]),
        first_position=tensor([first for _, _, first in slots]),
        table=tensor(
            [
                [index_of[i] for i in indices] + [unused] * (width - len(indices))
                for _, indices in builder.pairs_of_row
            ]
        ),
        table_rows=tensor([row for row, _ in builder.pairs_of_row]),
    )
