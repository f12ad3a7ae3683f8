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
from restem_lightning.sampler.scheduler import Limits, Scheduler

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
    assert [pool.allocate_private() for _ in range(2)] == [1, 2]
    assert pool.allocate_shared(3) == [8, 7, 6]
    assert pool.num_free == 3
    pool.release([1, 7])
    assert pool.allocate_private() == 1
    assert pool.allocate_shared(1) == [7]


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
            assert all(1 <= block <= 50 for block in new)
            taken |= set(new)
        assert pool.num_free == 50 - len(taken)


def make_scheduler(
    requests, *, num_blocks=200, lanes=6, tokens=10, max_new_tokens=12, context=1000
):
    return Scheduler(
        requests,
        BlockPool(num_blocks),
        Limits(
            block_size=BLOCK,
            num_lanes=lanes,
            unused_table=8,
            prefill_tokens=tokens,
            max_new_tokens=max_new_tokens,
            context=context,
        ),
        key_of=lambda request_id: (len(request_id), 0),
    )


def play(scheduler, length_of, *, on_step=lambda: None):
    """Runs a scheduler with a model that writes 0, 1, 2, ... up to the length of each sequence.

    Returns the completions and the parts of prompts in the order they were computed.
    """
    finished, chunks = {}, []

    def write(sequence):
        sequence.token_ids.append(len(sequence.token_ids))
        if len(sequence.token_ids) == length_of(sequence):
            scheduler.finish(sequence)
            finished[sequence.request_id, sequence.index] = sequence.token_ids

    for _ in range(10000):
        if scheduler.done:
            return finished, chunks
        for sequence in scheduler.admit():
            assert len(sequence.blocks) * BLOCK >= sequence.num_cached
            if not sequence.token_ids:
                write(sequence)
        new = scheduler.plan_prefill()
        assert sum(chunk.last - chunk.first for chunk in new) <= scheduler.limits.prefill_tokens
        chunks += new
        scheduler.complete_prefill()
        while scheduler.num_missing_blocks() > scheduler.pool.num_free:
            scheduler.preempt(scheduler.youngest())
        scheduler.grow()
        check(scheduler)
        on_step()
        for sequence in list(scheduler.running):
            assert sequence.num_cached == len(sequence.token_ids)
            write(sequence)
    raise AssertionError("the scheduler does not end")


def check(scheduler):
    """Checks that lanes, blocks and tables belong to one owner each and hold what they must."""
    running = list(scheduler.running)
    lanes = [sequence.lane for sequence in running]
    assert sorted(lanes + scheduler.free_lanes) == list(range(scheduler.limits.num_lanes))
    segments = {part for sequence in running for part in sequence.prompt.chain}
    segments |= {part for sequence in scheduler.ready for part in sequence.prompt.chain}
    segments |= {part for prompt, _ in scheduler.prefilling for part in prompt.chain}
    segments |= set(scheduler.preambles.values())
    used = [block for owner in [*running, *segments] for block in owner.blocks]
    assert len(used) == len(set(used)) == scheduler.pool.num_blocks - scheduler.pool.num_free
    tables = [segment.table for segment in segments]
    assert len(tables) == len(set(tables))
    assert all(table > scheduler.limits.unused_table for table in tables)
    for sequence in running:
        assert len(sequence.blocks) * BLOCK >= sequence.num_cached
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


def test_lanes_stay_full_while_there_is_work():
    scheduler = make_scheduler(some_requests(num=40), tokens=64)
    counts = []
    play(scheduler, length_of, on_step=lambda: counts.append(len(scheduler.running)))
    # A lane is empty for the step in which its sequence ends, and at both ends of the run.
    assert sum(count == 6 for count in counts[3:-12]) > 0.9 * len(counts[3:-12])


def test_compaction_moves_the_last_sequences_to_the_first_lanes():
    scheduler = make_scheduler(some_requests(num=2))
    scheduler.plan_prefill(), scheduler.plan_prefill()
    scheduler.complete_prefill()
    running = scheduler.admit()
    for sequence in (running[0], running[2]):
        scheduler.finish(sequence)
    left = list(scheduler.running)
    moves = scheduler.compact(len(left))
    assert sorted(sequence.lane for sequence in left) == list(range(len(left)))
    assert all(old >= len(left) > new for old, new in moves)
    check(scheduler)


def test_a_preamble_is_computed_once_and_first():
    scheduler = make_scheduler(some_requests(num=4, shared=8))
    _, chunks = play(scheduler, length_of)
    spans = [(chunk.segment, chunk.first, chunk.last) for chunk in chunks]
    preamble = [(first, last) for segment, first, last in spans if segment.is_preamble]
    assert preamble == [(0, 8)]
    assert spans[0][0].is_preamble
    assert len(spans) == len(set(spans))


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
