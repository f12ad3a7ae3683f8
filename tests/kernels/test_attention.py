"""The attention kernels against exact attention over the keys that a row sees, all else poisoned.

Without a GPU the interpreter of Triton runs them, which has no bfloat16 products.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from restem_kernels import reference
from restem_kernels.attention import block_attention, tile_rows
from restem_kernels.kv_cache import write_kv
from restem_kernels.work import Work
from torch.nn.functional import scaled_dot_product_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
SIZE, SPLIT, RANGE = 16, 32, 48  # of a block, of an own piece, of a tile's keys
NUM_BLOCKS, WIDTH = 64, 8  # blocks of the cache, and of a table
UNUSED = 2**30


@contextmanager
def poisoned_memory():
    """Fills new tensors with NaN: every part of a result must have been written."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(9, device=DEVICE).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row's position, the shared segments that it sees, and its own (None: no sequence)."""

    position: int
    shared: tuple[int, ...] = ()
    own: int | None = None


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Segments (start, number of keys), tables of them, and caches that are NaN elsewhere."""

    segments: list[tuple[int, int]]
    tables: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor


def make_scene(segments, *, num_key_heads=2, head_size=64, dtype=torch.float32) -> Scene:
    generator = torch.Generator().manual_seed(0)
    caches = torch.full((NUM_BLOCKS, 2, num_key_heads, SIZE, head_size), torch.nan)
    free = torch.randperm(NUM_BLOCKS - 1, generator=generator) + 1  # block 0 belongs to no one
    tables = torch.zeros(len(segments) + 1, WIDTH, dtype=torch.int32)  # and so does the last table
    for table, (_, num_keys) in zip(tables, segments, strict=False):
        num_blocks = -(-num_keys // SIZE)
        table[:num_blocks], free = free[:num_blocks].int(), free[num_blocks:]
        index = torch.arange(num_keys)
        written = torch.randn(num_keys, 2, num_key_heads, head_size, generator=generator)
        caches[table[index // SIZE].long(), :, :, index % SIZE] = written
    caches = caches.to(DEVICE, dtype)
    return Scene(
        segments=segments,
        tables=tables.to(DEVICE),
        key_cache=caches[:, 0],
        value_cache=caches[:, 1],
    )


def make_queries(num_rows, num_heads, head_size, dtype) -> torch.Tensor:
    """Returns queries [T, H, D] that lie between other things, as those of a fused product do."""
    generator = torch.Generator().manual_seed(1)
    wide = 2 * torch.randn(num_rows, num_heads + 3, head_size, generator=generator)
    return wide.to(DEVICE, dtype)[:, 1:-2]


def make_work(scene, rows, *, most_members, attend_own=True, spare=3) -> Work:
    """Returns lists with `spare` entries of nonsense behind those in use."""
    tiles, members, num_shared = [], [], [0] * len(rows)
    for segment, (start, num_keys) in enumerate(scene.segments):
        seeing = [number for number, row in enumerate(rows) if segment in row.shared]
        firsts = range(0, num_keys, RANGE)
        for begin in range(0, len(seeing), most_members):
            part = seeing[begin : begin + most_members]
            for number, first in enumerate(firsts):
                piece = num_shared[part[0]] + number
                last = min(first + RANGE, num_keys)
                tiles.append([len(members), len(part), segment, start, first, last, piece])
            members += part
        for number in seeing:
            num_shared[number] += len(firsts)
    own = [row.own if row.own is not None else len(scene.segments) for row in rows]
    own_starts = [scene.segments[row.own][0] if row.own is not None else 0 for row in rows]

    def tensor(values: list) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=DEVICE)

    return Work(
        tiles=tensor(tiles + [[UNUSED] * 7] * spare).reshape(-1, 7),
        num_tiles=tensor([len(tiles)]),
        members=tensor(members + [UNUSED] * spare),
        tables=scene.tables,
        positions=tensor([row.position for row in rows]),
        own_tables=tensor(own),
        own_starts=tensor(own_starts),
        num_shared=tensor(num_shared),
        attend_own=attend_own,
        split=SPLIT,
        num_pieces=max(num_shared) + WIDTH * SIZE // SPLIT,
    )


def keys_seen(scene, row, window) -> list[tuple[int, int]]:
    """Returns (segment, key) of all keys that the row sees, from the rule alone."""
    segments = [*row.shared] + [row.own] * (row.own is not None)
    return [
        (segment, index)
        for segment in segments
        for index in range(scene.segments[segment][1])
        if 0 <= row.position - scene.segments[segment][0] - index < (window or 2**20)
    ]


def plain_attention(queries, scene, row, dtype, *, scaling, window=None, softcap=None):
    """Returns attention [H, D] of one row with plain operations in a dtype."""
    seen = keys_seen(scene, row, window)
    if not seen:
        return torch.zeros_like(queries, dtype=dtype)
    segment, index = torch.tensor(seen, device=DEVICE).unbind(1)
    blocks = scene.tables[segment, index // SIZE].long()
    group = queries.shape[0] // scene.key_cache.shape[1]
    keys, values = (
        cache[blocks, :, index % SIZE].to(dtype).transpose(0, 1).repeat_interleave(group, 0)
        for cache in (scene.key_cache, scene.value_cache)
    )
    queries = queries.to(dtype)[:, None]
    if softcap is None:
        return scaled_dot_product_attention(queries, keys, values, scale=scaling)[:, 0]
    scores = softcap * torch.tanh(queries @ keys.transpose(1, 2) * scaling / softcap)
    return (scores.softmax(-1) @ values)[:, 0]


def check(scene, rows, queries, work, **settings):
    """Asserts that the kernels are at most twice as far off as plain operations, or by 2e-6."""
    settings["scaling"] = queries.shape[-1] ** -0.5
    with poisoned_memory():
        got = block_attention(queries, scene.key_cache, scene.value_cache, work, **settings)
    assert got.dtype == queries.dtype
    assert got.is_contiguous()
    clean = (cache.nan_to_num(0.0) for cache in (scene.key_cache, scene.value_cache))
    defined = reference.block_attention(queries, *clean, work, **settings)
    used = [n for n, row in enumerate(rows) if row.shared or row.own is not None]
    exact, plain = (
        torch.stack([plain_attention(queries[n], scene, rows[n], dtype, **settings) for n in used])
        for dtype in (torch.float64, queries.dtype)
    )
    allowed = max(2 * (plain - exact).abs().max().item(), 2e-6)
    assert (got[used] - exact).abs().max() <= allowed
    # The definition weights with logarithms of sums, so in float32 it is a little farther off.
    assert (defined[used] - exact).abs().max() <= 2 * allowed


# A preamble and two questions, and the tokens of eight sequences: one key, around one range and
# around two, a whole last block and a part of one.
SEGMENTS = [(0, 61), (61, 17), (61, 33), *[(78, n) for n in (1, 31, 32, 33, 63, 64, 65, 80)]]


ALL = [
    Row(position=78 + num_keys - 1, shared=(0, 1), own=own)
    for own, (_, num_keys) in enumerate(SEGMENTS)
    if own > 2
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("group", "head_size"), [(1, 64), (3, 80), (6, 128), (7, 256)])
def test_decoding_over_a_preamble_a_question_and_own_tokens(group, head_size, dtype):
    scene = make_scene(SEGMENTS, head_size=head_size, dtype=dtype)
    queries = make_queries(len(ALL), 2 * group, head_size, dtype)
    check(scene, ALL, queries, make_work(scene, ALL, most_members=tile_rows(group)))


@pytest.mark.parametrize("window", [1, 8, 40, 70, 1000])
def test_decoding_with_a_window(window):
    scene = make_scene(SEGMENTS)
    work = make_work(scene, ALL, most_members=3)
    check(scene, ALL, make_queries(8, 4, 64, torch.float32), work, window=window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.5, 50.0])
def test_decoding_with_a_softcap(softcap, dtype):
    scene = make_scene(SEGMENTS, dtype=dtype)
    work = make_work(scene, ALL, most_members=8)
    check(scene, ALL, make_queries(8, 4, 64, dtype), work, softcap=softcap)


@pytest.mark.parametrize("window", [None, 20])
def test_prefill_in_causal_tiles(window):
    # All tokens of a question, behind a preamble that was there: no own keys, eight tiles.
    rows = [Row(position=61 + n, shared=(0, 2)) for n in range(33)]
    scene = make_scene(SEGMENTS, num_key_heads=1)
    work = make_work(scene, rows, most_members=tile_rows(7), attend_own=False)
    check(scene, rows, make_queries(33, 7, 64, torch.float32), work, window=window)


@pytest.mark.parametrize("most_members", [1, 3])
def test_many_tiles_of_a_segment_and_two_questions(most_members):
    starts = [sum(SEGMENTS[question]) for question in (1, 1, 1, 2, 2)]
    lengths = [1, 33, 64, 31, 33]
    rows = [
        Row(position=start + length - 1, shared=(0, 1 if n < 3 else 2), own=3 + n)
        for n, (start, length) in enumerate(zip(starts, lengths, strict=True))
    ]
    scene = make_scene([*SEGMENTS[:3], *zip(starts, lengths, strict=True)])
    work = make_work(scene, rows, most_members=most_members)
    check(scene, rows, make_queries(5, 6, 64, torch.float32), work)


def test_a_single_row_is_enough():
    scene = make_scene(SEGMENTS, num_key_heads=1)
    work = make_work(scene, ALL[-1:], most_members=64)
    check(scene, ALL[-1:], make_queries(1, 1, 64, torch.float32), work)


@pytest.mark.parametrize("spare", [0, 3])
def test_no_tiles(spare):
    rows = [Row(position=row.position, own=row.own) for row in ALL]
    scene = make_scene(SEGMENTS)
    work = make_work(scene, rows, most_members=1, spare=spare)
    assert work.tiles.shape == (spare, 7)
    check(scene, rows, make_queries(8, 2, 64, torch.float32), work)


def test_nothing_at_all_to_see_is_zero():
    scene = make_scene(SEGMENTS)
    rows = [Row(position=5), Row(position=10, shared=(2,))]  # its segment begins at 61
    work = make_work(scene, rows, most_members=2, attend_own=False, spare=0)
    check(scene, rows, make_queries(2, 2, 64, torch.float32), work)
    queries = make_queries(2, 2, 64, torch.float32)
    got = block_attention(queries, scene.key_cache, scene.value_cache, work, scaling=1.0)
    assert not got.any()
    assert block_attention(
        queries[:0], scene.key_cache, scene.value_cache, work, scaling=1.0
    ).shape == (0, 2, 64)


def test_unused_rows_harm_no_other():
    rows = [Row(position=0), ALL[1], Row(position=0), ALL[4]]
    scene = make_scene(SEGMENTS)
    work = make_work(scene, rows, most_members=8)
    check(scene, rows, make_queries(4, 6, 64, torch.float32), work)


@pytest.mark.parametrize("settings", [{}, {"window": 40, "softcap": 5.0}])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_of_a_row_do_not_depend_on_the_batch(dtype, settings):
    prefill = [Row(position=61 + n, shared=(0, 2)) for n in range(0, 33, 5)]
    scene = make_scene(SEGMENTS, dtype=dtype)
    for rows, attend_own in ((ALL, True), (prefill, False)):
        queries = make_queries(len(rows), 6, 64, dtype)

        def attend(numbers, most_members, rows=rows, attend_own=attend_own, queries=queries):
            some = [rows[n] for n in numbers]
            work = make_work(scene, some, most_members=most_members, attend_own=attend_own)
            caches = scene.key_cache, scene.value_cache
            return block_attention(queries[numbers], *caches, work, scaling=0.125, **settings)

        together = attend(list(range(len(rows))), 21)
        for numbers, most_members in (([6, 1, 4], 2), ([5], 21)):
            assert torch.equal(attend(numbers, most_members), together[numbers])


def test_blocks_whose_offsets_need_more_than_32_bits():
    far = 2**31 // (2 * SIZE * 64)
    shape = far + NUM_BLOCKS, 2, SIZE, 64
    scene = make_scene(SEGMENTS, dtype=torch.float16)
    # Most of these 8 GB is never touched: on a CPU it takes no memory.
    caches = [torch.empty(shape, dtype=torch.float16, device=DEVICE) for _ in range(2)]
    for cache, near in zip(caches, (scene.key_cache, scene.value_cache), strict=True):
        cache[far:] = near
    queries = make_queries(len(ALL), 4, 64, torch.float16)
    work = make_work(scene, ALL, most_members=8)
    near = scene.key_cache, scene.value_cache
    new = make_queries(2 * len(ALL), 2, 64, torch.float16).unflatten(0, (2, -1))
    write_kv(*new, *near, work)
    expected = block_attention(queries, *near, work, scaling=0.125)
    work.tables += far
    write_kv(*new, *caches, work)
    assert torch.equal(block_attention(queries, *caches, work, scaling=0.125), expected)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="captures a CUDA graph")
def test_a_captured_graph_follows_the_lists():
    scene = make_scene(SEGMENTS, dtype=torch.float16)
    queries = make_queries(4, 6, 64, torch.float16)
    caches = scene.key_cache, scene.value_cache
    first, *others = (
        make_work(scene, rows, most_members=most_members, spare=9)
        for rows, most_members in ((ALL[:4], 2), (ALL[4:], 8), ([*ALL[2:5], Row(position=0)], 1))
    )
    block_attention(queries, *caches, first, scaling=0.125)  # compiles, which no graph may do
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = block_attention(queries, *caches, first, scaling=0.125)
    for work in others:
        for name in ("num_tiles", "positions", "own_tables", "own_starts", "num_shared"):
            getattr(first, name).copy_(getattr(work, name))
        for name in ("tiles", "members"):
            values, target = getattr(work, name), getattr(first, name)
            length = min(len(values), len(target))
            target[:length] = values[:length]
        graph.replay()
        expected = block_attention(queries, *caches, work, scaling=0.125)
        assert torch.equal(got[:3], expected[:3])
