"""What earlier iterations accepted, beside what this one did: each completion once."""

import tracemalloc

import pyarrow as pa

from restem_lightning.loop.mixing import MixParams, mix
from restem_lightning.selection import ACCEPTED_SCHEMA


def accepted(addresses):
    rows = [
        {"iteration": iteration, "problem_id": problem_id, "completion_index": index,
         "prompt_ids": [1], "completion_ids": [2], "text": "", "logprobs": [0.0], "weight": 1.0}
        for iteration, problem_id, index in addresses
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=ACCEPTED_SCHEMA)


def mixed(now, *earlier):
    tables = mix(
        map(accepted, now), MixParams(earlier=True), problems=[], template=None, tokenizer=None,
        earlier=map(accepted, earlier),
    )  # fmt: skip
    columns = pa.concat_tables(tables).select(["iteration", "problem_id", "completion_index"])
    return [tuple(row.values()) for row in columns.to_pylist()]


def test_a_completion_that_several_iterations_accepted_is_there_once_where_it_came_first():
    now = [[(2, "a", 1), (2, "b", 40)], [(2, "c", 0)]]
    first = [(1, "a", 1), (1, "b", 40), (2, "a", 1)]  # of an iteration that shared its pool
    second = [(1, "a", 1), (1, "a", 40), (2, "b", 1), (2, "c", 0)]
    assert mixed(now, first, second) == [
        (2, "a", 1), (2, "b", 40), (2, "c", 0), (1, "a", 1), (1, "b", 40), (1, "a", 40),
        (2, "b", 1),
    ]  # fmt: skip


def test_human_solutions_of_earlier_iterations_are_left_out():
    assert mixed([[(2, "a", 0)]], [(0, "a", 0), (1, "b", 0), (0, "b", 0)]) == [
        (2, "a", 0), (1, "b", 0),
    ]  # fmt: skip


def test_more_completions_of_the_same_problems_are_held_in_bits():
    def held(num_completions):
        now = accepted((1, f"p{p}", index) for p in range(50) for index in range(num_completions))
        tables = mix(
            [now], MixParams(earlier=True), problems=[], template=None, tokenizer=None,
            earlier=[now],
        )  # fmt: skip
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        next(tables)
        next(tables)  # all of them are known now, nothing else is held
        grown = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        return grown

    few, many = held(100), held(400)
    assert (many - few) / (50 * 300) < 8  # bytes of a completion; a string takes over 50
