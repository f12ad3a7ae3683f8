"""Bookkeeping without a model: blocks, segments, what runs next."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

import restem_lightning.sampler
from restem_lightning.errors import UserError
from restem_lightning.sampler import Request
from restem_lightning.sampler.blocks import BlockPool
from restem_lightning.sampler.scheduler import Scheduler

BLOCK = 4


@pytest.mark.parametrize("name", ["params", "sequence", "blocks", "scheduler", "stop"])
def test_bookkeeping_imports_no_torch(name):
    # The package's own __init__ loads the engine, so the file is imported beside it.
    folder = Path(restem_lightning.sampler.__file__).parent
    code = (
        "import importlib, sys, types\n"
        "package = types.ModuleType('restem_lightning.sampler')\n"
        f"package.__path__ = [{str(folder)!r}]\n"
        "sys.modules[package.__name__] = package\n"
        f"importlib.import_module('restem_lightning.sampler.{name}')\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_private_blocks_come_from_the_low_end_and_shared_ones_from_the_high_end():
    pool = BlockPool(8)
    assert [pool.allocate_private() for _ in range(2)] == [0, 1]
    assert pool.allocate_shared(3) == [7, 6, 5]
    assert pool.num_free == 3
    pool.release([0, 6])
    assert pool.allocate_private() == 0
    assert pool.allocate_shared(1) == [6]


def test_a_pool_hands_out_every_block_once():
    pool, rng, taken = BlockPool(50), random.Random(0), set()
    for _ in range(2000):
        if taken and rng.random() < 0.5:
            gone = rng.sample(sorted(taken), rng.randint(1, min(5, len(taken))))
            pool.release(gone)
            taken -= set(gone)
        elif pool.num_free >= 3:
            new = [pool.allocate_private()] if rng.random() < 0.7 else pool.allocate_shared(3)
            assert not taken & set(new)
            assert all(0 <= block < 50 for block in new)
            taken |= set(new)
        assert pool.num_free == 50 - len(taken)


def make_scheduler(requests, *, num_blocks=200, batch=6, tokens=10, max_new_tokens=12):
    return Scheduler(
        requests,
        BlockPool(num_blocks),
        block_size=BLOCK,
        max_batch_size=batch,
        max_batch_tokens=tokens,
        max_new_tokens=max_new_tokens,
        key_of=lambda request_id: (len(request_id), 0),
    )


def play(scheduler, length_of):
    """Runs a scheduler with a model that writes 0, 1, 2, ... up to the length of each sequence."""
    finished, starts = {}, []

    def write(sequence):
        sequence.token_ids.append(len(sequence.token_ids))
        if len(sequence.token_ids) == length_of(sequence):
            scheduler.finish(sequence)
            finished[sequence.request_id, sequence.index] = sequence.token_ids

    for _ in range(10000):
        if scheduler.done:
            return finished, starts
        for sequence in [sequence for sequence in scheduler.admit() if not sequence.token_ids]:
            starts.append(sequence.request_id)
            write(sequence)
        step = scheduler.plan()
        check(scheduler, step)
        for _ in scheduler.complete(step):
            pass
        for sequence, _, last in step.decode:
            if last == len(sequence.token_ids):
                write(sequence)
    raise AssertionError("the scheduler does not end")


def check(scheduler, step):
    """Checks that a step fits its budget, writes each block once and computes what is missing."""
    num_rows = sum(last - first for _, first, last in step.decode) + BLOCK * len(step.prefill)
    assert num_rows <= scheduler.max_batch_tokens
    assert len(step.decode) <= len(scheduler.running) <= scheduler.max_batch_size
    used = [block for sequence in scheduler.running for block in sequence.blocks]
    segments = {id(part): part for s in scheduler.running for part in s.prompt.chain}
    segments |= {id(part): part for s, _ in scheduler.prefilling for part in s.chain}
    used += [block for segment in segments.values() for block in segment.blocks]
    assert len(used) == len(set(used))
    for sequence, first, last in step.decode:
        assert first == sequence.num_cached < last
        assert len(sequence.blocks) * BLOCK >= last
        assert all(part.num_scheduled == len(part.token_ids) for part in sequence.prompt.chain)


def some_requests(num=9, shared=5):
    return [
        Request(
            request_id=str(number),
            prompt_ids=(*range(shared), *range(100 * number, 101 * number + 1)),
            num_shared=shared,
            indices=(0, 2, 5),
        )
        for number in range(num)
    ]


def length_of(sequence):
    return 1 + (7 * int(sequence.request_id) + 3 * sequence.index) % 12


@pytest.mark.parametrize("num_blocks", [200, 24, 9])
@pytest.mark.parametrize("tokens", [6, 10, 64])
def test_every_completion_is_written_to_its_end(num_blocks, tokens):
    scheduler = make_scheduler(some_requests(), num_blocks=num_blocks, tokens=tokens)
    finished, _ = play(scheduler, length_of)
    assert len(finished) == 27
    assert all(written == list(range(len(written))) for written in finished.values())
    assert (scheduler.num_preemptions > 0) == (num_blocks == 9)


def test_all_blocks_but_those_of_preambles_are_free_at_the_end():
    scheduler = make_scheduler(some_requests(shared=5), num_blocks=30)
    play(scheduler, length_of)
    assert scheduler.pool.num_free == 30 - 2  # 5 tokens in blocks of 4


def test_requests_start_in_their_order():
    scheduler = make_scheduler(some_requests())
    _, starts = play(scheduler, length_of)
    assert starts == sorted(starts)


def test_a_preamble_is_computed_once():
    scheduler = make_scheduler(some_requests(num=4, shared=8))
    written = []
    plan = scheduler.plan
    scheduler.plan = lambda: (step := plan(), written.extend(step.prefill))[0]
    play(scheduler, length_of)
    preamble = [number for segment, number in written if segment.is_preamble]
    assert preamble == [0, 1]
    assert len(written) == len(set(written))


def test_a_request_whose_prompt_is_all_preamble_keeps_its_last_token():
    request = Request(request_id="1", prompt_ids=(1, 2, 3, 4), num_shared=4)
    scheduler = make_scheduler([request])
    finished, _ = play(scheduler, length_of)
    assert list(finished) == [("1", 0)]
    assert list(scheduler.preambles) == [(1, 2, 3)]


def test_a_cache_too_small_for_one_completion_is_refused():
    scheduler = make_scheduler(some_requests(shared=8), num_blocks=5)
    with pytest.raises(UserError, match=r"engine\.cache_tokens \(20\) must hold"):
        play(scheduler, length_of)
