"""Lanes: what the device knows of the sequences being decoded, one row each.

The host changes a lane when a sequence starts, ends or moves; in between, the device goes from
token to token by itself.

Shape legend: B lanes.
"""

import torch
from restem_kernels.work import Work
from torch import Tensor

from restem_lightning.sampler.batch import TileList
from restem_lightning.sampler.sequence import Sequence


class Lanes:
    """Rows of the decode batch, and the block tables."""

    def __init__(
        self,
        num_lanes: int,
        *,
        split: int,
        own_keys: int,
        block_size: int,
        device: torch.device,
    ):
        """Makes every lane unused.

        Args:
            num_lanes: B, a multiple of 8.
            split: keys of an own piece.
            own_keys: most tokens of a completion.
            block_size: tokens in a block.
            device: where the tensors are.
        """
        self.num_lanes, self.split, self.device = num_lanes, split, device
        self.own_keys = own_keys
        self.num_pieces = 4 - (-own_keys // split)  # four of a prompt, more when one needs more
        self.unused_table = num_lanes

        def ints(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.tokens = ints(num_lanes, dtype=torch.int64)
        self.keys = ints(num_lanes, 2, dtype=torch.int64)
        self.completion_index = ints(num_lanes, dtype=torch.int64)
        self.draw_positions = ints(num_lanes, dtype=torch.int64)
        self.positions = ints(num_lanes, dtype=torch.int32)
        self.own_starts = ints(num_lanes, dtype=torch.int32)
        self.num_shared = ints(num_lanes, dtype=torch.int32)
        self.own_tables = ints(num_lanes, dtype=torch.int32) + self.unused_table
        self.in_use = ints(num_lanes, dtype=torch.int32)
        width = max(64, -(-own_keys // block_size))
        self.tables = ints(3 * num_lanes + 8, width, dtype=torch.int32)
        self.tiles = ints(4 * num_lanes, 7, dtype=torch.int32)
        self.num_tiles = ints(1, dtype=torch.int32)
        self.members = ints(4 * num_lanes, dtype=torch.int32)
        self.generation = 0  # changes when a tensor is replaced: captured graphs are void then

    def to_device(self, values: list, dtype: torch.dtype) -> Tensor:
        """Returns a tensor of host values, copied without waiting for the device."""
        tensor = torch.tensor(values, dtype=dtype)
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def place(self, sequences: list[Sequence], num_shared: list[int]) -> Tensor:
        """Fills the lanes of sequences that start; returns the lanes [m] int64.

        A sequence whose tokens the host knows goes on with its last one; a new one still needs its
        first token in `tokens`.

        Args:
            sequences: each with its lane.
            num_shared: pieces of each one's prompt.
        """
        lanes = self.to_device([sequence.lane for sequence in sequences], torch.int64)
        wide = self.to_device(
            [
                (*s.key, s.index, max(1, len(s.token_ids)), s.token_ids[-1] if s.token_ids else 0)
                for s in sequences
            ],
            torch.int64,
        )
        narrow = self.to_device(
            [
                (s.prompt.end + s.num_cached, s.prompt.end, pieces, s.lane, 1)
                for s, pieces in zip(sequences, num_shared, strict=True)
            ],
            torch.int32,
        )
        self.keys[lanes] = wide[:, :2]
        for column, target in enumerate(
            (self.completion_index, self.draw_positions, self.tokens), 2
        ):
            target[lanes] = wide[:, column]
        targets = (self.positions, self.own_starts, self.num_shared, self.own_tables, self.in_use)
        for column, target in enumerate(targets):
            target[lanes] = narrow[:, column]
        return lanes

    def clear(self, lanes: list[int]) -> None:
        """Makes lanes unused."""
        index = self.to_device(lanes, torch.int64)
        self.own_tables[index] = self.unused_table
        for target in (self.positions, self.own_starts, self.num_shared, self.in_use):
            target[index] = 0

    def move(self, moves: list[tuple[int, int]]) -> None:
        """Copies lanes; the old ones become unused.

        Args:
            moves: (from, to) pairs.
        """
        pairs = self.to_device(moves, torch.int64)
        old, new = pairs.unbind(1)
        for tensor in (
            self.tokens, self.keys, self.completion_index, self.draw_positions, self.positions,
            self.own_starts, self.num_shared, self.in_use, self.tables,
        ):  # fmt: skip
            tensor[new] = tensor[old]
        self.own_tables[new] = new.int()
        self.clear([lane for lane, _ in moves])

    def set_blocks(self, entries: list[tuple[int, int, int]]) -> None:
        """Writes (table, place, block) entries of the block tables."""
        if not entries:
            return
        height = 1 + max(table for table, _, _ in entries)
        width = 1 + max(place for _, place, _ in entries)
        if height > self.tables.shape[0] or width > self.tables.shape[1]:
            shape = [
                max(size, 2 * needed if needed > size else 0)
                for size, needed in zip(self.tables.shape, (height, width), strict=True)
            ]
            larger = torch.zeros(shape, dtype=torch.int32, device=self.device)
            larger[: self.tables.shape[0], : self.tables.shape[1]] = self.tables
            self.tables = larger
            self.generation += 1
        packed = self.to_device(entries, torch.int64)
        self.tables[packed[:, 0], packed[:, 1]] = packed[:, 2].int()

    def set_tiles(self, listed: TileList) -> None:
        """Replaces the shared tiles."""
        for name, values in (("tiles", listed.tiles), ("members", listed.members)):
            held = getattr(self, name)
            if len(values) > len(held):
                held = held.new_zeros((2 * len(values), *held.shape[1:]))
                setattr(self, name, held)
                self.generation += 1
            if values:
                held[: len(values)] = self.to_device(values, torch.int32)
        self.num_tiles.copy_(self.to_device([len(listed.tiles)], torch.int32))

    def reserve_pieces(self, num_shared: int) -> None:
        """Makes room for rows with this many pieces of their prompts."""
        needed = num_shared - (-self.own_keys // self.split)
        if needed > self.num_pieces:
            self.num_pieces = needed
            self.generation += 1

    def work(self, num_rows: int) -> Work:
        """Returns the work of the first lanes; it follows the lanes as they change."""
        return Work(
            tiles=self.tiles,
            num_tiles=self.num_tiles,
            members=self.members,
            tables=self.tables,
            positions=self.positions[:num_rows],
            own_tables=self.own_tables[:num_rows],
            own_starts=self.own_starts[:num_rows],
            num_shared=self.num_shared[:num_rows],
            attend_own=True,
            split=self.split,
            num_pieces=self.num_pieces,
        )

    def advance(self, tokens: Tensor) -> None:
        """Takes the drawn tokens [n] int64 of the first n lanes as their next input."""
        num_rows = len(tokens)
        self.tokens[:num_rows] = tokens
        self.positions[:num_rows].add_(self.in_use[:num_rows])
        self.draw_positions[:num_rows].add_(1)
