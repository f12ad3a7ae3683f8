"""The kernels that rotate queries and keys and write into the cache, against their definitions."""

import pytest
import torch
from restem_kernels import reference
from restem_kernels.kv_cache import rotate_and_write, write_kv
from restem_kernels.work import DUMP_BLOCK, Work

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NUM_BLOCKS, SLOTS, NUM_POSITIONS = 12, 8, 40
# Query heads, key heads, head size.
SHAPES = [(4, 2, 64), (15, 5, 64), (6, 3, 80), (1, 1, 96), (12, 2, 128), (14, 2, 6), (4, 1, 256)]


def ints(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def work_of(positions, own_tables, own_starts):
    """Returns the parts of a work list that say where rows go; table 3 is that of unused rows."""
    return Work(
        tiles=ints([[0] * 7]),
        num_tiles=ints([0]),
        members=ints([0]),
        tables=ints([[2, 9, 4], [11, 5, 7], [1, 10, 3], [DUMP_BLOCK] * 3]),
        positions=ints(positions),
        own_tables=ints(own_tables),
        own_starts=ints(own_starts),
        num_shared=ints([0] * len(positions)),
        attend_own=True,
        split=SLOTS,
        num_pieces=1,
    )


def five_rows():
    """Returns work of rows at both ends of a block and of a table, in no order."""
    return work_of([17, 3, 39, 30, 8], [1, 0, 2, 1, 0], [10, 3, 16, 10, 0])


def caches(num_key_heads, size, dtype):
    shape = (NUM_BLOCKS, num_key_heads, SLOTS, size)
    return [torch.full(shape, torch.nan, dtype=dtype, device=DEVICE) for _ in range(2)]


def random(*shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def angles(size, dtype):
    """Returns cos and sin of another angle in each column: no half is the other's copy."""
    angle = 7 * random(NUM_POSITIONS, size, dtype=torch.float32, seed=1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def same(got, wanted):
    return torch.equal(got.nan_to_num(1e4), wanted.nan_to_num(1e4))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_write_puts_each_row_in_its_place_and_touches_nothing_else(shape, dtype):
    _, num_key_heads, size = shape
    keys, values = random(2, 5, num_key_heads, size, dtype=dtype)
    got, wanted = (caches(num_key_heads, size, dtype) for _ in range(2))
    write_kv(keys, values, *got, five_rows())
    reference.write_kv(keys, values, *wanted, five_rows())
    for mine, theirs in zip(got, wanted, strict=True):
        assert same(mine, theirs)
        assert int(mine.isnan().sum()) == mine.numel() - keys.numel()


def test_write_takes_keys_and_values_as_views_of_one_tensor():
    heads = random(5, 4 + 3 + 3, 24, dtype=torch.float32)
    keys, values = heads[:, 4:7], heads[:, 7:]
    got, wanted = (caches(3, 24, torch.float32) for _ in range(2))
    write_kv(keys, values, *got, five_rows())
    reference.write_kv(keys, values, *wanted, five_rows())
    assert all(map(same, got, wanted))


def test_write_into_caches_that_are_views():
    keys, values = random(2, 5, 3, 24, dtype=torch.float32)
    both = torch.full((NUM_BLOCKS, 2, 3, SLOTS, 24), torch.nan, device=DEVICE)
    write_kv(keys, values, both[:, 0], both[:, 1], five_rows())
    wanted = caches(3, 24, torch.float32)
    reference.write_kv(keys, values, *wanted, five_rows())
    assert same(both, torch.stack(wanted, 1))


def test_rows_that_share_a_place_leave_the_value_of_any_of_them():
    keys, values = random(2, 6, 2, 16, dtype=torch.float32)
    got = caches(2, 16, torch.float32)
    write_kv(keys, values, *got, work_of([4, 0, 0, 0, 0, 21], [0, 3, 3, 3, 3, 2], [0] * 6))
    for cache, new in zip(got, (keys, values), strict=True):
        assert torch.equal(cache[2, :, 4], new[0])
        assert torch.equal(cache[3, :, 5], new[5])
        assert (cache[DUMP_BLOCK, :, 0] == new[1:5]).any(0).all()
        assert int(cache.isnan().sum()) == cache.numel() - 3 * new[0].numel()


def test_nothing_is_written_for_no_rows():
    got = caches(2, 16, torch.float32)
    empty = torch.empty(0, 2, 16, device=DEVICE)
    cos, sin = angles(16, torch.float32)
    write_kv(empty, empty, *got, work_of([], [], []))
    queries = rotate_and_write(empty.new_empty(0, 96), cos, sin, *got, work_of([], [], []))
    assert queries.shape == (0, 2, 16)
    assert all(cache.isnan().all() for cache in got)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rotation_and_write_are_bitwise_those_of_the_reference(shape, dtype):
    num_heads, num_key_heads, size = shape
    qkv = random(5, (num_heads + 2 * num_key_heads) * size, dtype=dtype)
    got, wanted = (caches(num_key_heads, size, dtype) for _ in range(2))
    mine = rotate_and_write(qkv, *angles(size, dtype), *got, five_rows())
    theirs = reference.rotate_and_write(qkv, *angles(size, dtype), *wanted, five_rows())
    assert mine.shape == (5, num_heads, size)
    assert torch.equal(mine, theirs)
    assert all(map(same, got, wanted))


def exact(qkv, shape, *, q_norm, k_norm, eps):
    """Returns the rotated queries and keys of five_rows() in float64, and the values."""
    num_heads, num_key_heads, size = shape
    heads = qkv.double().unflatten(-1, (-1, size))
    cos, sin = (table.double()[five_rows().positions.long()] for table in angles(size, qkv.dtype))

    def rotate(x, norm):
        if norm is not None:
            scale = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
            x = norm.double() * x * scale
        low, high = x.chunk(2, dim=-1)
        return x * cos[:, None] + torch.cat((-high, low), -1) * sin[:, None]

    queries, keys = heads[:, :num_heads], heads[:, num_heads : num_heads + num_key_heads]
    return rotate(queries, q_norm), rotate(keys, k_norm), heads[:, num_heads + num_key_heads :]


def written(cache):
    """Returns what five_rows() wrote [5, K, D]."""
    work = five_rows()
    index = (work.positions - work.own_starts).long()
    blocks = work.tables[work.own_tables.long(), index // SLOTS].long()
    return cache[blocks, :, index % SLOTS]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norms", ["none", "both", "queries", "keys"])
def test_rotation_is_as_precise_as_the_reference(shape, dtype, norms):
    num_heads, num_key_heads, size = shape
    qkv = 2 * random(5, (num_heads + 2 * num_key_heads) * size, dtype=dtype)
    q_norm, k_norm = 1 + random(2, size, dtype=dtype, seed=2) / 4
    settings = {
        "q_norm": q_norm if norms in ("both", "queries") else None,
        "k_norm": k_norm if norms in ("both", "keys") else None,
        "eps": 1e-6,
    }
    got, wanted = (caches(num_key_heads, size, dtype) for _ in range(2))
    tables = angles(size, dtype)
    mine = rotate_and_write(qkv, *tables, *got, five_rows(), **settings)
    theirs = reference.rotate_and_write(qkv, *tables, *wanted, five_rows(), **settings)
    queries, keys, values = exact(qkv, shape, **settings)
    # The interpreter cuts off where a GPU rounds to bfloat16: norm, weight, product and sum.
    units = 4 if dtype == torch.bfloat16 and DEVICE == "cpu" else 1
    for x, y, truth in ((mine, theirs, queries), (written(got[0]), written(wanted[0]), keys)):
        error, allowed = ((z.double() - truth).abs().max() for z in (x, y))
        assert error <= max(2 * allowed, units * torch.finfo(dtype).eps * truth.abs().max())
    assert torch.equal(written(got[1]).double(), values)
    for cache in got:
        assert int(cache.isnan().sum()) == cache.numel() - 5 * num_key_heads * size


def test_rotation_takes_rows_that_lie_apart():
    wide = torch.full((5, 200), torch.nan, device=DEVICE)
    wide[:, :160] = random(5, 160, dtype=torch.float32)
    tables = angles(16, torch.float32)
    got, wanted = (caches(3, 16, torch.float32) for _ in range(2))
    mine = rotate_and_write(wide[:, :160], *tables, *got, five_rows())
    theirs = reference.rotate_and_write(wide[:, :160], *tables, *wanted, five_rows())
    assert torch.equal(mine, theirs)
    assert all(map(same, got, wanted))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_any_batch(dtype):
    shape = (7, 3, 32)
    num_heads, num_key_heads, size = shape
    qkv = random(5, (num_heads + 2 * num_key_heads) * size, dtype=dtype)
    norms = {"q_norm": random(size, dtype=dtype), "k_norm": random(size, dtype=dtype), "eps": 1e-6}
    whole = caches(num_key_heads, size, dtype)
    together = rotate_and_write(qkv, *angles(size, dtype), *whole, five_rows(), **norms)
    rows = five_rows()
    for chosen in ([3], [4, 1], [4, 3, 2, 1, 0]):
        work = work_of(
            *(part[chosen].tolist() for part in (rows.positions, rows.own_tables, rows.own_starts))
        )
        part = caches(num_key_heads, size, dtype)
        queries = rotate_and_write(qkv[chosen], *angles(size, dtype), *part, work, **norms)
        assert torch.equal(queries, together[chosen])
        for mine, theirs in zip(part, whole, strict=True):
            assert torch.equal(written(mine)[chosen], written(theirs)[chosen])
