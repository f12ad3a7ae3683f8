"""Procedurally generated function problems: the domain of the embedded code policy.

A problem asks for a function that changes a list of numbers in two to four steps and returns
something of it. Its split depends on what the function does, not on its wording or names, so no
program can occur in two splits. The tests tell near misses apart: a program that leaves a step out
or has a number one off fails one of them.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from typing import Any

from restem_lightning.problems.records import Problem
from restem_lightning.problems.splits import GeneratedProblems, split_of

NAMES = ("solve", "pick", "clean", "work", "apply", "run", "change", "go")
ARGUMENTS = ("xs", "nums", "values", "items")
# What a step is called, and its expression of the list `xs`; {k} is a number from 2 to 9.
STEPS = (
    ("keep the even ones", "[x for x in xs if x % 2 == 0]"),
    ("keep the odd ones", "[x for x in xs if x % 2 == 1]"),
    ("keep those above {k}", "[x for x in xs if x > {k}]"),
    ("keep those below {k}", "[x for x in xs if x < {k}]"),
    ("drop the multiples of {k}", "[x for x in xs if x % {k} != 0]"),
    ("add {k} to each", "[x + {k} for x in xs]"),
    ("subtract {k} from each", "[x - {k} for x in xs]"),
    ("multiply each by {k}", "[x * {k} for x in xs]"),
    ("divide each by {k} without the rest", "[x // {k} for x in xs]"),
    ("square each", "[x * x for x in xs]"),
    ("negate each", "[-x for x in xs]"),
    ("sort them", "sorted(xs)"),
    ("sort them in falling order", "sorted(xs, reverse=True)"),
    ("reverse them", "xs[::-1]"),
    ("take the first {k}", "xs[:{k}]"),
    ("take the last {k}", "xs[-{k}:]"),
    ("leave out the first {k}", "xs[{k}:]"),
    ("take every second one", "xs[::2]"),
)
RESULTS = (
    ("return the list", "xs"),
    ("return the sum", "sum(xs)"),
    ("return how many there are", "len(xs)"),
    ("return the largest or 0", "max(xs, default=0)"),
    ("return the smallest or 0", "min(xs, default=0)"),
)
NUM_TESTS = 6
NUM_TRIES = 5  # draws of the tests' inputs before a problem is given up


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a function does.

    Args:
        steps: (index into STEPS, number) of each step.
        result: index into RESULTS.
    """

    steps: tuple[tuple[int, int], ...]
    result: int

    def expressions(self) -> list[str]:
        """Returns the expression of each step, then that of the result, all of `xs`."""
        steps = [STEPS[kind][1].replace("{k}", str(k)) for kind, k in self.steps]
        return [*steps, RESULTS[self.result][1]]

    def run(self, xs: list[int]) -> Any:
        """Returns what the function returns for a list."""
        for expression in self.expressions():
            xs = _function(expression)(xs)
        return xs

    def near_misses(self) -> Iterator["Task"]:
        """Yields tasks that a careless writer could take it for."""
        for at, (kind, k) in enumerate(self.steps):
            before, after = self.steps[:at], self.steps[at + 1 :]
            yield replace(self, steps=before + after)
            if "{k}" in STEPS[kind][1]:
                yield replace(self, steps=(*before, (kind, k - 1), *after))
                yield replace(self, steps=(*before, (kind, k + 1), *after))


@cache
def _function(expression: str) -> Callable[[list[int]], Any]:
    return eval(f"lambda xs: {expression}")  # only ever one of the expressions above


def draw_task(rng: random.Random, num_steps: int) -> Task:
    """Returns a random task of some steps, each of another kind."""
    kinds = rng.sample(range(len(STEPS)), num_steps)
    steps = tuple((kind, rng.randint(2, 9) if "{k}" in STEPS[kind][1] else 0) for kind in kinds)
    return Task(steps=steps, result=rng.randrange(len(RESULTS)))


def draw_inputs(rng: random.Random, task: Task) -> list[list[int]] | None:
    """Returns lists on which every near miss shows, None if none are found."""
    misses = list(task.near_misses())
    for _ in range(NUM_TRIES):
        inputs = [
            [rng.randint(-9, 20) for _ in range(rng.randint(6, 12))] for _ in range(NUM_TESTS)
        ]
        if all(any(miss.run(xs) != task.run(xs) for xs in inputs) for miss in misses):
            return inputs
    return None


def write_question(task: Task, name: str, argument: str) -> str:
    """Returns the problem in words."""
    told = [STEPS[kind][0].replace("{k}", str(k)) for kind, k in task.steps]
    return f"Write {name}({argument}): {', then '.join([*told, RESULTS[task.result][0]])}."


def write_program(task: Task, name: str, argument: str) -> str:
    """Returns the function's source, a step a line."""
    *steps, result = [e.replace("xs", argument) for e in task.expressions()]
    body = [f"    {argument} = {step}" for step in steps]
    return "\n".join([f"def {name}({argument}):", *body, f"    return {result}"])


def draw_split(split: str, seed: int) -> Iterator[tuple[str, Task, str, str, list[list[int]]]]:
    """Yields (question, task, name, argument, inputs of the tests) of one split without end.

    No question comes twice. The same seed gives the same ones.
    """
    rng, seen = random.Random(f"functions/{split}/{seed}"), set()
    while True:
        num_steps, inputs = rng.randint(2, 4), None
        while inputs is None:
            task = draw_task(rng, num_steps)
            if split_of(write_program(task, "f", "xs")) == split:
                inputs = draw_inputs(rng, task)
        name, argument = rng.choice(NAMES), rng.choice(ARGUMENTS)
        question = write_question(task, name, argument)
        if question not in seen:
            seen.add(question)
            yield question, task, name, argument, inputs


class FunctionProblems(GeneratedProblems):
    """Small functions on lists of numbers, generated on the spot."""

    source = "function_problems"

    def load(self) -> list[Problem]:
        """Returns the problems, the same ones at every call."""
        drawn = islice(draw_split(self.split, self.seed), self.num)
        return [self._problem(index, *each) for index, each in enumerate(drawn)]

    def _problem(
        self, index: int, question: str, task: Task, name: str, argument: str, inputs: list
    ) -> Problem:
        return Problem(
            problem_id=f"{self.source}/{self.split}/{self.seed}/{index}",
            question=question,
            reference_solution=write_program(task, name, argument),
            tests="\n".join(f"assert {name}({xs}) == {task.run(xs)}" for xs in inputs),
            entry_point=name,
            split=self.split,
            source=self.source,
            metadata={"num_steps": len(task.steps)},
        )
