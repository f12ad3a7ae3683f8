from itertools import islice

import pytest

from restem_lightning.errors import UserError
from restem_lightning.problems import FunctionProblems, check_splits
from restem_lightning.problems.functions import STEPS, Task, draw_split, write_program
from restem_lightning.problems.splits import SPLIT_SHARES
from restem_lightning.verifiers.programs import extract_program


def passes(problem, program):
    space = {}
    exec(program, space)
    try:
        exec(problem.tests, space)
    except AssertionError:
        return False
    return True


def test_every_reference_passes_its_own_tests_also_out_of_a_completion():
    for problem in FunctionProblems("train", 200).load():
        assert passes(problem, problem.reference_solution)
        assert extract_program(problem.reference_solution, problem).rstrip() == (
            problem.reference_solution
        )


def test_problems_are_the_same_at_every_call_and_other_ones_for_another_seed():
    first, again, other = (FunctionProblems("train", 50, seed).load() for seed in (1, 1, 2))
    assert first == again
    assert {p.question for p in first}.isdisjoint(p.question for p in other)


def test_splits_share_no_question_and_no_program():
    splits = {split: FunctionProblems(split, 200).load() for split in SPLIT_SHARES}
    check_splits(splits)
    seen = {}
    for split in SPLIT_SHARES:
        for _, task, *_ in islice(draw_split(split, 0), 200):
            assert seen.setdefault(write_program(task, "f", "xs"), split) == split


def test_no_question_comes_twice():
    questions = [problem.question for problem in FunctionProblems("train", 500).load()]
    assert len(set(questions)) == 500


def test_near_misses_fail_the_tests():
    for _, task, *_, inputs in islice(draw_split("held_out", 0), 100):
        wanted = [task.run(xs) for xs in inputs]
        misses = list(task.near_misses())
        assert len(misses) >= len(task.steps)
        assert all([miss.run(xs) for xs in inputs] != wanted for miss in misses)


def test_a_task_runs_as_its_program_does():
    task = Task(steps=((2, 3), (5, 4)), result=1)  # above 3, add 4, the sum
    assert [STEPS[kind][0] for kind, _ in task.steps] == ["keep those above {k}", "add {k} to each"]
    program = write_program(task, "go", "nums")
    assert program == (
        "def go(nums):\n    nums = [x for x in nums if x > 3]\n"
        "    nums = [x + 4 for x in nums]\n    return sum(nums)"
    )
    assert task.run([1, 3, 4, 10]) == 22


def test_problems_have_two_to_four_steps_in_equal_shares():
    counts = [problem.metadata["num_steps"] for problem in FunctionProblems("train", 300).load()]
    assert all(75 <= counts.count(num_steps) <= 125 for num_steps in (2, 3, 4))


@pytest.mark.parametrize(("split", "num"), [("test", 5), ("train", 0)])
def test_a_wrong_split_or_number_is_refused(split, num):
    with pytest.raises(UserError, match=r"split \(test\)|num \(0\)"):
        FunctionProblems(split, num)
