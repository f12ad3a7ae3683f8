"""The CPU's versions of the operations against their definitions."""

import pytest
import torch
from restem_kernels import cpu, reference
from restem_kernels.work import DUMP_BLOCK, Work

T, K, D, S = 21, 2, 16, 8
PREAMBLE, QUESTIONS = 43, (9, 30)  # tokens


def ints(values):
    return torch.tensor(values, dtype=torch.int32)


def scene(seed=0):
    """Returns a decode step of 20 rows in two groups behind one preamble, and one unused row."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randint(1, 40, (T - 1,), generator=generator).tolist()  # tokens of each row
    groups = [list(range(0, 18)), [18, 19]]
    blocks = iter((1 + torch.randperm(200, generator=generator)).tolist())
    tables = torch.zeros(T + 3, 8, dtype=torch.int32)
    lengths = [*own, 1, PREAMBLE, *QUESTIONS]
    for table, length in enumerate(lengths):
        for place in range(-(-length // S)):
            tables[table, place] = DUMP_BLOCK if table == T - 1 else next(blocks)
    tiles, members = [], []

    def add(rows, table, start, length, piece):
        for first in range(0, len(rows), cpu.tile_rows(1)):
            part = rows[first : first + cpu.tile_rows(1)]
            for key in range(0, length, 16):
                tile = (len(members), len(part), table, start, key, min(key + 16, length))
                tiles.append((*tile, piece + key // 16))
            members.extend(part)

    add(groups[0] + groups[1], T, 0, PREAMBLE, 0)
    for group, table, length in zip(groups, (T + 1, T + 2), QUESTIONS, strict=True):
        add(group, table, PREAMBLE, length, 3)
    starts = [PREAMBLE + QUESTIONS[row in groups[1]] for row in range(T - 1)]
    return Work(
        tiles=ints(tiles),
        num_tiles=ints([len(tiles)]),
        members=ints(members),
        tables=tables,
        positions=ints(
            [start + length - 1 for start, length in zip(starts, own, strict=True)] + [0]
        ),
        own_tables=ints(range(T)),
        own_starts=ints([*starts, 0]),
        num_shared=ints([3 + -(-(start - PREAMBLE) // 16) for start in starts] + [0]),
        attend_own=True,
        split=16,
        num_pieces=12,
    )


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("settings", [{}, {"window": 25}, {"softcap": 2.0}, {"window": 70}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_attention_is_that_of_the_reference(dtype, settings, group):
    work = scene()
    generator = torch.Generator().manual_seed(1)
    caches = [torch.randn(210, K, S, D, generator=generator).to(dtype) for _ in range(2)]
    queries = 2 * torch.randn(T, K * group, D, generator=generator).to(dtype)
    ready = cpu.prepare(work, caches[0])
    got = cpu.block_attention(queries, *caches, ready, scaling=0.3, **settings)
    exact = reference.block_attention(queries, *caches, work, scaling=0.3, **settings)
    assert not got[-1].any()  # the unused row
    # Scores, weights and values are rounded to the dtype once each, all of order one.
    bound = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    assert (got[:-1].float() - exact[:-1].float()).abs().max() < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norms", [False, True])
def test_rotate_and_write_is_that_of_the_reference(norms, dtype):
    work, group = scene(), 3
    generator = torch.Generator().manual_seed(2)
    qkv = torch.randn(T, (group * K + 2 * K) * D, generator=generator).to(dtype)
    angles = torch.randn(200, D // 2, generator=generator).repeat(1, 2)
    tables = angles.cos().to(dtype), angles.sin().to(dtype)
    weights = {}
    if norms:
        names = ("q_norm", "k_norm")
        weights = {name: torch.rand(D, generator=generator).to(dtype) for name in names}
        weights["eps"] = 1e-6
    results = []
    for ops, ready in ((reference, work), (cpu, cpu.prepare(work, torch.empty(210, K, S, D)))):
        caches = [torch.zeros(210, K, S, D, dtype=dtype) for _ in range(2)]
        queries = ops.rotate_and_write(qkv, *tables, *caches, ready, **weights)
        results.append([queries, *caches])
    # In bfloat16 a last bit of values up to four: the mean of a norm is added in another order.
    for expected, got in zip(*results, strict=True):
        assert torch.allclose(got, expected, atol=2e-6 if dtype == torch.float32 else 0.04, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_residual", [False, True])
def test_add_rms_norm_is_that_of_the_reference(with_residual, dtype):
    x, residual = torch.randn(2, 7, 40).to(dtype)
    weight = torch.rand(40).to(dtype)
    residual = residual if with_residual else None
    expected = reference.add_rms_norm(x, weight, eps=1e-5, residual=residual)
    got = cpu.add_rms_norm(x, weight, eps=1e-5, residual=residual)
    assert torch.equal(got[1], expected[1])
    bound = 4 * torch.finfo(dtype).eps
    assert torch.allclose(got[0], expected[0], rtol=bound, atol=bound)
