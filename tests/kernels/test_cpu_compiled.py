"""The C functions for the CPU against their definitions, all that is not to be read poisoned."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from restem_kernels import c_library, cpu_compiled, reference
from restem_kernels.work import Work
from torch.nn.functional import scaled_dot_product_attention

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DTYPES = [torch.float32, torch.bfloat16]
PREAMBLE, QUESTIONS = 163, (9, 70)  # tokens
OWN = (1, 2, 31, 32, 33, 64, 129, 200, 5, 17, 40)  # tokens of each row
GROUPS = (tuple(range(8)), (8, 9, 10))  # rows of each question
RANGE = 160  # keys of a tile


def ints(values):
    return torch.tensor(values, dtype=torch.int32)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Keys and values of every segment [tokens, K, D], the caches that hold them, and tables."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    tables: torch.Tensor
    caches: list[torch.Tensor]


def make_scene(num_key_heads, head_size, block_size, dtype) -> Scene:
    """Returns one segment a row, then the preamble and the questions; the last table is unused."""
    lengths = [*OWN, PREAMBLE, *QUESTIONS]
    num_blocks = 1 + sum(-(-length // block_size) for length in lengths)
    free = iter((1 + torch.randperm(num_blocks - 1)).tolist())
    tables = torch.zeros(len(lengths) + 1, 1 + max(lengths) // block_size, dtype=torch.int32)
    for table, length in enumerate(lengths):
        for place in range(-(-length // block_size)):
            tables[table, place] = next(free)
    keys, values = (
        [random(n, num_key_heads, head_size, seed=seed + n).to(dtype) for n in lengths]
        for seed in (0, 1000)
    )
    shape = num_blocks, num_key_heads, block_size, head_size
    caches = [torch.full(shape, torch.nan, dtype=dtype) for _ in range(2)]
    places = [(index, table) for table, n in enumerate(lengths) for index in range(n)]
    work = make_work(tables, [], positions=places)
    new = (torch.cat(parts) for parts in (keys, values))
    cpu_compiled.write_kv(*new, *caches, cpu_compiled.prepare(work, caches[0]))
    return Scene(keys=keys, values=values, tables=tables, caches=caches)


def make_work(tables, tiles, *, positions, starts=0, members=(), attend_own=False) -> Work:
    """Returns lists of rows with (position, own table)."""
    position, own_table = torch.tensor(positions).T
    return Work(
        tiles=ints([*tiles, [2**30] * 7]),
        num_tiles=ints([len(tiles)]),
        members=ints(members),
        tables=tables,
        positions=position.int(),
        own_tables=own_table.int(),
        own_starts=torch.as_tensor(starts, dtype=torch.int32).expand(len(positions)).contiguous(),
        num_shared=ints([0] * len(positions)),
        attend_own=attend_own,
        split=32,
        num_pieces=20,
    )


def decode_work(scene, rows, *, most_members=2**30) -> Work:
    """Returns a decode step of some rows, by their number; None is one that is not in use."""
    tiles, members, positions, starts = [], [], [], []

    def add(seeing, table, start, length, piece):
        for begin in range(0, len(seeing), most_members):
            part = seeing[begin : begin + most_members]
            for number, key in enumerate(range(0, length, RANGE)):
                last = min(key + RANGE, length)
                tiles.append([len(members), len(part), table, start, key, last, piece + number])
            members.extend(part)

    used = [place for place, row in enumerate(rows) if row is not None]
    add(used, len(OWN), 0, PREAMBLE, 0)
    for number, group in enumerate(GROUPS):
        seeing = [place for place in used if rows[place] in group]
        add(seeing, len(OWN) + 1 + number, PREAMBLE, QUESTIONS[number], 2)
    for row in rows:
        start = 0 if row is None else PREAMBLE + QUESTIONS[row in GROUPS[1]]
        starts.append(start)
        unused = 0, len(scene.tables) - 1
        positions.append(unused if row is None else (start + OWN[row] - 1, row))
    return make_work(
        scene.tables, tiles, positions=positions, starts=starts, members=members, attend_own=True
    )


def attend(scene, queries, work, **settings):
    ready = cpu_compiled.prepare(work, scene.caches[0])
    return cpu_compiled.block_attention(queries, *scene.caches, ready, **settings)


def plain(scene, queries, row, dtype, *, scaling, window=None, softcap=None):
    """Returns attention [H, D] of one row with plain operations in a dtype."""
    segments = len(OWN), len(OWN) + 1 + (row in GROUPS[1]), row
    group = queries.shape[0] // scene.keys[0].shape[1]
    keys, values = (
        torch.cat([parts[segment] for segment in segments])[-(window or 2**20) :]
        .to(dtype)
        .transpose(0, 1)
        .repeat_interleave(group, 0)
        for parts in (scene.keys, scene.values)
    )
    queries = queries.to(dtype)[:, None]
    if softcap is None:
        return scaled_dot_product_attention(queries, keys, values, scale=scaling)[:, 0]
    scores = softcap * torch.tanh(queries @ keys.transpose(1, 2) * scaling / softcap)
    return (scores.softmax(-1) @ values)[:, 0]


def make_queries(num_rows, num_heads, head_size, dtype):
    """Returns queries [T, H, D] that lie between other things."""
    return (2 * random(num_rows, num_heads + 3, head_size, seed=1)).to(dtype)[:, 1:-2]


def assert_as_precise_as_plain(scene, dtype, group, **settings):
    """At most twice the error of plain torch in the same dtype."""
    rows = [*range(len(OWN)), None]
    num_key_heads, head_size = scene.keys[0].shape[1:]
    settings["scaling"] = head_size**-0.5
    queries = make_queries(len(rows), num_key_heads * group, head_size, dtype)
    got = attend(scene, queries, decode_work(scene, rows), **settings)
    assert not got[-1].any()  # the unused row
    exact, usual = (
        torch.stack([plain(scene, queries[r], r, kind, **settings) for r in rows[:-1]])
        for kind in (torch.float64, dtype)
    )
    assert (got[:-1] - exact).abs().max() <= 2 * (usual - exact).abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("group", "head_size", "block_size"),
    [(3, 64, 32), (1, 64, 32), (2, 80, 16), (4, 128, 8), (7, 256, 64), (17, 96, 5), (5, 8, 8)],
)
def test_decoding_over_a_preamble_a_question_and_own_tokens(group, head_size, block_size, dtype):
    assert_as_precise_as_plain(make_scene(2, head_size, block_size, dtype), dtype, group)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("settings", [{"window": n} for n in (1, 8, 33, 140, 1000)])
def test_decoding_with_a_window(settings, dtype):
    assert_as_precise_as_plain(make_scene(2, 64, 32, dtype), dtype, 3, **settings)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.5, 5.0, 50.0])
def test_decoding_with_a_softcap(softcap, dtype):
    assert_as_precise_as_plain(make_scene(2, 64, 32, dtype), dtype, 2, softcap=softcap)


@pytest.mark.parametrize("window", [None, 20])
def test_prefill_in_causal_tiles(window):
    scene = make_scene(1, 64, 32, torch.float32)
    tiles = [[0, 90, len(OWN), 0, 0, 160, 0], [20, 70, len(OWN), 0, 160, 163, 1]]
    positions = [(73 + row, len(OWN)) for row in range(90)]
    work = make_work(scene.tables, tiles, positions=positions, members=list(range(90)))
    queries = make_queries(90, 7, 64, torch.float32)
    got = attend(scene, queries, work, scaling=0.125, window=window)
    for row, (position, _) in enumerate(positions):
        seen = slice(max(0, position + 1 - (window or 999)), position + 1)
        keys, values = (x[len(OWN)][seen].transpose(0, 1) for x in (scene.keys, scene.values))
        expected = scaled_dot_product_attention(queries[row][:, None], keys, values, scale=0.125)
        assert torch.allclose(got[row], expected[:, 0], atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("settings", [{}, {"window": 50}, {"softcap": 3.0}])
def test_a_row_has_the_same_bits_in_any_batch_and_with_any_threads(settings, dtype):
    scene, settings = make_scene(2, 64, 32, dtype), {"scaling": 0.125, **settings}
    queries = make_queries(len(OWN), 6, 64, dtype)
    together = attend(scene, queries, decode_work(scene, list(range(len(OWN)))), **settings)
    for rows, most_members in (([7, 1, 9, 4], 2**30), ([5], 1), (list(range(11))[::-1], 3)):
        torch.set_num_threads(1 + len(rows) % 2)
        work = decode_work(scene, rows, most_members=most_members)
        assert torch.equal(attend(scene, queries[rows], work, **settings), together[rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(("head_size", "block_size"), [(64, 32), (80, 5), (8, 8)])
def test_rotate_and_write_is_that_of_the_reference(head_size, block_size, norms, dtype):
    scene = make_scene(2, head_size, block_size, dtype)
    rows = [*range(len(OWN)), None]
    work = decode_work(scene, rows)
    qkv = random(len(rows), 10 * head_size + 7).to(dtype)[:, 3:-4]
    angles = random(500, head_size // 2).repeat(1, 2)
    tables, settings = (angles.cos().to(dtype), angles.sin().to(dtype)), {}
    if norms:
        weights = 1 + random(2, head_size).to(dtype) / 4
        settings = {"q_norm": weights[0], "k_norm": weights[1], "eps": 1e-6}
    ready = cpu_compiled.prepare(work, scene.caches[0])
    got = cpu_compiled.rotate_and_write(qkv, *tables, *scene.caches, ready, **settings)
    plain_caches = [torch.zeros_like(cache) for cache in scene.caches]
    wanted = reference.rotate_and_write(qkv, *tables, *plain_caches, work, **settings)
    bound = 8 * torch.finfo(dtype).eps  # a few roundings of values up to four
    assert torch.allclose(got, wanted, atol=bound, rtol=bound)
    # The order of keys in a block is its own affair: what was written shows in attention alone.
    alone = make_work(
        scene.tables,
        [],
        positions=list(zip(work.positions.tolist(), work.own_tables.tolist(), strict=True))[:-1],
        starts=work.own_starts[:-1],
        attend_own=True,
    )
    queries = make_queries(len(OWN), 6, head_size, dtype)
    new = attend(scene, queries, alone, scaling=0.125, window=1)
    blocks = work.tables[work.own_tables.long(), (work.positions - work.own_starts) // block_size]
    slots = (work.positions - work.own_starts).long() % block_size
    written = plain_caches[1][blocks.long(), :, slots][:-1]
    assert torch.equal(new, written.repeat_interleave(3, 1))  # the only value that it sees
    seen = attend(scene, queries, decode_work(scene, rows[:-1]), scaling=0.125, window=2)
    keys = plain_caches[0][blocks.long(), :, slots][:-1]
    for row in (1, 2, 7):  # rows with an older key of their own
        pair = [torch.stack([x[row][-2], y[row]], 1) for x, y in (
            (scene.keys, keys), (scene.values, written))]  # fmt: skip
        expected = scaled_dot_product_attention(
            queries[row].view(2, 3, -1).float(), *(x.float() for x in pair), scale=0.125
        )
        assert (seen[row].view(2, 3, -1).float() - expected).abs().max() <= 2 * bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 7, 64, 576, 3000])
@pytest.mark.parametrize("with_residual", [True, False])
def test_norm_and_sum_are_those_of_the_reference(with_residual, size, dtype):
    wide = random(2, 5, size + 9).to(dtype)[..., 2 : 2 + size]
    x, residual = wide[0], wide[1] if with_residual else None
    weight = 1 + random(size, seed=1).to(dtype) / 4
    got = cpu_compiled.add_rms_norm(x, weight, eps=1e-5, residual=residual)
    wanted = reference.add_rms_norm(x, weight, eps=1e-5, residual=residual)
    assert torch.equal(got[1], wanted[1])
    total = wanted[1].double()
    exact = weight * total / (total.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    floor = torch.finfo(dtype).eps * exact.abs().max()
    allowed = max(2 * (wanted[0] - exact).abs().max(), floor)
    assert (got[0] - exact).abs().max() <= allowed
    some = cpu_compiled.add_rms_norm(
        x[[3, 1]], weight, eps=1e-5, residual=residual[[3, 1]] if with_residual else None
    )
    assert torch.equal(some[0], got[0][[3, 1]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 40, 1536])
def test_gated_silu_is_that_of_the_reference(size, dtype):
    gate_up = (8 * random(5, 2 * size + 3)).to(dtype)[:, 1:-2]
    gate_up[0, 0] = -200.0  # where e**-x is more than float32 holds
    got = cpu_compiled.gated_silu(gate_up)
    gate, up = gate_up.double().chunk(2, -1)
    exact = torch.nn.functional.silu(gate) * up
    wanted = reference.gated_silu(gate_up)
    floor = torch.finfo(dtype).eps * exact.abs().max()
    assert (got - exact).abs().max() <= max(2 * (wanted - exact).abs().max(), floor)


def python(code, **environment):
    """Runs a program; returns it when it has ended."""
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "kernels")])
    return subprocess.Popen(
        [sys.executable, *code],
        env=os.environ | {"PYTHONPATH": path} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("less", ["-mno-avx512f", "-mno-avx512f -mno-avx2 -mno-fma"])
def test_processors_with_smaller_vectors_pass_the_same_tests(less, tmp_path):
    chosen = "decoding or prefill or rotate or norm or silu"
    done = python(
        ["-m", "pytest", "-q", "-x", __file__, "-k", chosen, "-p", "no:cacheprovider"],
        CC=f"gcc {less}", XDG_CACHE_HOME=str(tmp_path),
    )  # fmt: skip
    out, err = done.communicate(timeout=300)
    assert done.returncode == 0, out[-3000:] + err


LOAD = "import torch\nfrom restem_kernels import c_library\nc_library.load(torch.float32)"


def test_processes_that_compile_at_once_leave_one_library(tmp_path):
    both = [python(["-c", LOAD], XDG_CACHE_HOME=str(tmp_path)) for _ in range(2)]
    for one in both:
        _, err = one.communicate(timeout=120)
        assert one.returncode == 0, err
    files = list((tmp_path / "restem_kernels").iterdir())
    assert [file.suffix for file in files] == [".so"]
    before = files[0].stat().st_mtime_ns
    assert python(["-c", LOAD], XDG_CACHE_HOME=str(tmp_path)).wait(timeout=120) == 0
    assert files[0].stat().st_mtime_ns == before  # not compiled again


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler"])
def test_no_compiler_is_said_in_one_line(compiler, monkeypatch):
    monkeypatch.setenv("CC", compiler)
    load = c_library.load.__wrapped__  # not the library that is loaded already
    with pytest.raises(c_library.NoCompiler, match=f"^.*{compiler}.*$"):
        load(torch.float32)


def test_torch_and_the_c_functions_share_one_openmp_runtime():
    c_library.load(torch.float32)
    maps = Path("/proc/self/maps").read_text()
    assert len(set(re.findall(r"/\S*/lib(?:gomp|iomp5|omp)[-.]\S*", maps))) == 1


def test_other_types_of_numbers_are_refused():
    with pytest.raises(c_library.NoCompiler, match="float16"):
        c_library.load(torch.float16)
