"""Block attention on the CPU in few large products of torch.

It is defined by `reference.block_attention`.

Tiles of equal shape are one batched product. Own pieces are one block each; where their blocks lie
close together they are read in place, in the order of the cache, with no gather. Each product has
the same shape for a row whatever else is in the batch, so a row's result is the same bits.

Shape legend: T rows, H query heads, K key heads, G = H // K, D head size, S tokens in a block,
g tiles, m rows of a tile, n blocks of a tile, L = n * S keys, P pieces.
"""

from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from restem_kernels.work import (
    DUMP_BLOCK,
    FIRST_KEY,
    FIRST_MEMBER,
    LAST_KEY,
    NUM_MEMBERS,
    PIECE,
    START,
    TABLE,
    Work,
)

TILE_ROWS = 16
_LOWEST = -1e30  # stands for -inf, with no NaN in differences


def tile_rows(group: int) -> int:
    """Returns how many rows a tile of `Work.tiles` may have; the same for every group size."""
    return TILE_ROWS


@dataclass(kw_only=True)
class _Tiles:
    """Tiles of one shape.

    Args:
        rows: [g, m] int64, T in unused places.
        blocks: [g, n] int64, or a slice of g blocks.
        length: L.
        num_keys: [g, m] int64, how many of the keys a row sees, from the first on.
        starts: [g] int64, position of the first key.
        masks: [g, 1, m * G, L] by window, made when first needed; None where rows see all keys.
    """

    rows: Tensor
    blocks: Tensor | slice
    length: int
    num_keys: Tensor
    starts: Tensor
    masks: dict[int | None, Tensor | None] = field(default_factory=dict)


@dataclass(kw_only=True)
class Pass:
    """A work list made ready for one forward pass: what all its layers need.

    Args:
        work: the lists.
        slots: [T * K] int64, place of each row's keys among all heads' keys of a layer's cache.
        tiles: tiles by shape.
        pieces: [T, P] int64, places of each row's pieces among the rows of all tiles.
        rotation: cosines and sines of the rows' positions, each [T, 1, D / 2], once they are known.
    """

    work: Work
    slots: Tensor
    tiles: list[_Tiles]
    pieces: Tensor
    rotation: tuple[Tensor, Tensor] | None = None


def prepare(work: Work, key_cache: Tensor) -> Pass:
    """Returns a work list ready for the layers of one forward pass.

    Args:
        work: its lists are read here, so they must not change before the pass is over.
        key_cache: [n, K, S, D] of any layer.
    """
    _, num_heads, size, _ = key_cache.shape
    positions, tables = work.positions.numpy(), work.tables.numpy()
    own_tables, own_starts = work.own_tables.numpy(), work.own_starts.numpy()
    index = positions - own_starts
    blocks = tables[own_tables, index // size].astype(np.int64)
    slots = (blocks[:, None] * num_heads + np.arange(num_heads)) * size + (index % size)[:, None]
    num_rows = len(positions)
    sets = _shared_tiles(work, size, num_rows)
    if work.attend_own:
        sets += _own_tiles(work, index, size)
    pieces, place = [], 0
    for tiles, piece_of in sets:
        rows = tiles.rows.numpy().reshape(-1)
        used = rows < num_rows
        pieces.append(np.stack([rows, piece_of.reshape(-1), place + np.arange(len(rows))])[:, used])
        place += len(rows)
    row, number, where = np.concatenate(pieces, 1) if pieces else np.zeros((3, 0), np.int64)
    table = np.full((num_rows, int(number.max(initial=0)) + 1), place, np.int64)
    table[row, number] = where
    return Pass(
        work=work,
        slots=torch.from_numpy(slots.reshape(-1)),
        tiles=[tiles for tiles, _ in sets],
        pieces=torch.from_numpy(table),
    )


def _shared_tiles(work: Work, size: int, num_rows: int) -> list[tuple[_Tiles, np.ndarray]]:
    """Returns the tiles over shared segments by shape, each with its rows' pieces [g, m]."""
    listed = work.tiles[: int(work.num_tiles)].numpy()
    members, tables = work.members.numpy(), work.tables.numpy()
    positions = np.append(work.positions.numpy(), -1)

    def shape(tile: np.ndarray) -> int:
        return -(-(tile[LAST_KEY] - tile[FIRST_KEY]) // size)

    found = []
    for num_blocks, same in groupby(sorted(listed, key=shape), key=shape):
        tiles = np.stack(list(same))
        rows = np.full((len(tiles), TILE_ROWS), num_rows, np.int64)
        for place, tile in enumerate(tiles):
            first, count = tile[FIRST_MEMBER], tile[NUM_MEMBERS]
            rows[place, :count] = members[first : first + count]
        first_keys = tiles[:, FIRST_KEY].astype(np.int64)
        starts = tiles[:, START] + first_keys
        blocks = tables[
            tiles[:, TABLE, None], first_keys[:, None] // size + np.arange(num_blocks)
        ].astype(np.int64)
        lengths = (tiles[:, LAST_KEY] - first_keys)[:, None]
        seen = np.minimum(positions[rows] + 1 - starts[:, None], lengths)
        pieces = np.repeat(tiles[:, PIECE, None], TILE_ROWS, 1)
        if (tiles[:, TABLE] == tiles[0, TABLE]).all() and (first_keys == first_keys[0]).all():
            # All over the same keys: one tile of many rows.
            blocks, starts = blocks[:1], starts[:1]
            rows, seen, pieces = (array.reshape(1, -1) for array in (rows, seen, pieces))
        ready = _Tiles(
            rows=torch.from_numpy(rows),
            blocks=torch.from_numpy(blocks),
            length=num_blocks * size,
            num_keys=torch.from_numpy(seen),
            starts=torch.from_numpy(starts),
        )
        found.append((ready, pieces))
    return found


def _own_tiles(work: Work, index: np.ndarray, size: int) -> list[tuple[_Tiles, np.ndarray]]:
    """Returns one set of tiles of one row and one block, with the rows' pieces [g, 1].

    Args:
        work: the lists.
        index: [T], place of each row's key within its own table.
        size: tokens in a block.
    """
    tables, own_tables = work.tables.numpy(), work.own_tables.numpy()
    num_blocks = np.where(tables[own_tables, 0] == DUMP_BLOCK, 0, index // size + 1)
    total = int(num_blocks.sum())
    if total == 0:
        return []
    rows = np.repeat(np.arange(len(index)), num_blocks)
    number = np.arange(total) - np.repeat(num_blocks.cumsum() - num_blocks, num_blocks)
    blocks = tables[own_tables[rows], number].astype(np.int64)
    low, high = int(blocks.min()), int(blocks.max()) + 1
    if high - low <= 2 * total and len(np.unique(blocks)) == total:
        slots, place, count = blocks - low, slice(low, high), high - low
    else:
        slots, place, count = np.arange(total), torch.from_numpy(blocks[:, None]), total
    columns = np.zeros((4, count), np.int64)
    columns[0] = len(index)
    columns[:, slots] = (
        rows,
        np.minimum(size, index[rows] + 1 - number * size),
        work.own_starts.numpy()[rows] + number * size,
        work.num_shared.numpy()[rows] + number,
    )
    rows, seen, starts, pieces = columns
    tiles = _Tiles(
        rows=torch.from_numpy(rows[:, None]),
        blocks=place,
        length=size,
        num_keys=torch.from_numpy(seen[:, None]),
        starts=torch.from_numpy(starts),
    )
    return [(tiles, pieces[:, None])]


def write_kv(
    keys: Tensor, values: Tensor, key_cache: Tensor, value_cache: Tensor, ready: Pass
) -> None:
    """Does what `reference.write_kv` does."""
    for cached, new in ((key_cache, keys), (value_cache, values)):
        cached.view(-1, cached.shape[-1]).index_copy_(0, ready.slots, new.flatten(0, 1))


def _mask(tiles: _Tiles, positions: Tensor, group: int, window: int | None) -> Tensor | None:
    """Returns [g, 1, m * G, L] float32: 0 for keys that a row sees, else the lowest score.

    None stands for zeros: every row that is in use sees every key.
    """
    used = tiles.rows < len(positions)
    if window is None and bool((tiles.num_keys[used] >= tiles.length).all()):
        return None
    index = torch.arange(tiles.length)
    visible = index < tiles.num_keys[..., None]
    if window is not None:
        rows = tiles.rows.clamp_max(len(positions) - 1)
        oldest = positions[rows] - (window - 1) - tiles.starts[:, None]
        visible &= index >= oldest[..., None]
    mask = torch.zeros(visible.shape).masked_fill_(~visible, _LOWEST)
    return mask.repeat_interleave(group, dim=1)[:, None]


def _attend(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float, softcap
) -> tuple[Tensor, Tensor]:
    """Returns the weighted values [g, K, M, D] and the log-sum-exp of the scores [g, K, M] float32.

    Plain products: torch's flash attention for the CPU takes two to four times longer at these
    sizes (measured, torch 2.13, AVX-512).

    Args:
        queries: [g, K, M, D], M rows and heads that share a key head.
        keys: [g, K, L, D].
        values: [g, K, L, D].
        mask: [g, 1, M, L] float32, added to the scores; None for zeros.
        scaling: factor of the scores.
        softcap: bound of the scores (Gemma 2), None for no bound.
    """
    scores = (queries @ keys.transpose(-1, -2)).float().mul_(scaling)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    if mask is not None:
        scores += mask
    weights = scores.softmax(-1)
    # The largest weight is exp(highest score - log-sum-exp), at least 1 / L.
    normalizer = scores.amax(-1) - weights.amax(-1).log_()
    return weights.to(values.dtype) @ values, normalizer


def _attend_tiles(
    tiles: _Tiles, positions: Tensor, queries: Tensor, caches: tuple[Tensor, Tensor], scaling,
    softcap, window,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns weighted values [g * m, H, D] and log-sum-exps [g * m, H] of one set of tiles.

    Args:
        tiles: the set.
        positions: [T].
        queries: [T + 1, H, D].
        caches: keys and values of a layer.
        scaling: see `_attend`.
        softcap: see `_attend`.
        window: positions a row can see, None for all.
    """
    g, m = tiles.rows.shape
    _, num_heads, head_size = queries.shape
    num_key_heads = caches[0].shape[1]
    group = num_heads // num_key_heads
    if isinstance(tiles.blocks, slice):
        keys, values = (cached[tiles.blocks] for cached in caches)
    else:
        keys, values = (
            cached.index_select(0, tiles.blocks.flatten())
            .unflatten(0, tiles.blocks.shape)
            .transpose(1, 2)
            .reshape(g, num_key_heads, -1, head_size)
            for cached in caches
        )
    if window not in tiles.masks:
        tiles.masks[window] = _mask(tiles, positions, group, window)
    mask = tiles.masks[window]
    chosen = (
        queries.index_select(0, tiles.rows.flatten())
        .view(g, m, num_key_heads, group, head_size)
        .transpose(1, 2)
        .reshape(g, num_key_heads, m * group, head_size)
    )
    mixed, normalizers = _attend(chosen, keys, values, mask, scaling, softcap)
    shape = (g, num_key_heads, m, group)
    return (
        mixed.view(*shape, head_size).transpose(1, 2).reshape(-1, num_heads, head_size),
        normalizers.view(shape).transpose(1, 2).reshape(-1, num_heads),
    )


def block_attention(
    queries: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    ready: Pass,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Returns what `reference.block_attention` does; a row that writes to the dump block is zero.

    Tiles must begin at the start of a block and have at most TILE_ROWS rows.
    """
    # One more row than there are: the unused places of tiles point to it.
    padded = torch.nn.functional.pad(queries, (0, 0, 0, 0, 0, 1))
    caches = key_cache, value_cache
    pieces = [
        _attend_tiles(tiles, ready.work.positions, padded, caches, scaling, softcap, window)
        for tiles in ready.tiles
    ]
    nothing = padded[-1:]
    lowest = torch.full(nothing.shape[:2], _LOWEST)
    mixed, normalizers = (
        torch.cat([*parts, unused])
        .index_select(0, ready.pieces.flatten())
        .unflatten(0, ready.pieces.shape)
        for parts, unused in zip(zip(*pieces, strict=True), (nothing, lowest), strict=True)
    )
    weights = (normalizers - normalizers.amax(1, keepdim=True)).exp_()  # [T, P, H]
    weights /= weights.sum(1, keepdim=True)
    return (weights[..., None] * mixed).sum(1).to(queries.dtype)
