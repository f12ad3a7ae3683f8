"""Procedurally generated arithmetic word problems: the domain of the embedded default.

A problem starts with a count of things and changes it two to four times. Its split is a function
of its own text (`split_of`), so no problem can occur in two splits, whatever the seeds.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from restem_lightning.problems.records import Problem
from restem_lightning.problems.splits import GeneratedProblems, split_of

NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gia", "Hugo", "Ivy", "Jon", "Kim", "Leo")
THINGS = ("apples", "beads", "books", "cards", "coins", "pens", "shells", "stamps", "stones")
BOXES = ("bags", "boxes", "packs")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One change of the count: the sentence that tells it and the calculations that follow it.

    Each calculation is (left, operator, right); a left of None stands for the count so far.
    """

    sentence: str
    calculations: tuple[tuple[int | None, str, int | None], ...]


def calculate(left: int, operator: str, right: int) -> int:
    """Returns left operator right for the operators +, - and *."""
    return {"+": left + right, "-": left - right, "*": left * right}[operator]


def _draw_step(rng: random.Random, count: int, things: str) -> Step:
    """Returns a change that keeps the count between 0 and 99."""
    kind = rng.choice(("more", "fewer", "boxes", "sold boxes", "times"))
    if kind == "times" and count < 50:
        return Step(sentence="doubles the number", calculations=((None, "*", 2),))
    boxes, each = rng.randint(2, 6), rng.randint(2, 9)
    if kind == "boxes" and count + boxes * each < 100:
        sentence = f"buys {boxes} {rng.choice(BOXES)} of {each} {things}"
        return Step(sentence=sentence, calculations=((boxes, "*", each), (None, "+", None)))
    if kind == "sold boxes" and count >= boxes * each:
        sentence = f"sells {boxes} {rng.choice(BOXES)} of {each} {things}"
        return Step(sentence=sentence, calculations=((boxes, "*", each), (None, "-", None)))
    if count > 70 or (kind == "fewer" and count > 3):
        given = rng.randint(2, min(count, 30))
        return Step(
            sentence=f"{rng.choice(('gives away', 'loses', 'sells'))} {given}",
            calculations=((None, "-", given),),
        )
    found = rng.randint(2, 29)
    return Step(
        sentence=f"{rng.choice(('finds', 'gets', 'buys'))} {found} more",
        calculations=((None, "+", found),),
    )


def draw_problem(rng: random.Random) -> tuple[str, int, tuple[Step, ...]]:
    """Returns (question, starting count, steps) of one random problem."""
    name, things, start = rng.choice(NAMES), rng.choice(THINGS), rng.randint(5, 60)
    steps, count = [], start
    for _ in range(rng.randint(2, 4)):
        step = _draw_step(rng, count, things)
        steps.append(step)
        count = work_out(count, (step,))[-1][-1]
    told = ", then ".join(step.sentence for step in steps)
    question = f"{name} has {start} {things}. {name} {told}. How many {things} are there now?"
    return question, start, tuple(steps)


def work_out(count: int, steps: tuple[Step, ...]) -> list[tuple[int, str, int, int]]:
    """Returns the calculations (left, operator, right, result) from count to the answer."""
    worked = []
    for step in steps:
        product = None
        for left, operator, right in step.calculations:
            first = count if left is None else left
            second = product if right is None else right
            result = calculate(first, operator, second)
            worked.append((first, operator, second, result))
            if left is None:
                count = result
            else:
                product = result
    return worked


def write_solution(worked: list[tuple[int, str, int, int]]) -> str:
    """Returns the worked solution as text: an equation a line, then `#### answer`."""
    lines = [f"{left}{operator}{right}={result}" for left, operator, right, result in worked]
    return "\n".join([*lines, f"#### {worked[-1][-1]}"])


def draw_split(split: str, seed: int) -> Iterator[tuple[str, int, tuple[Step, ...]]]:
    """Yields distinct problems of one split without end, the same ones for the same seed."""
    rng, seen = random.Random(f"{split}/{seed}"), set()
    while True:
        problem = draw_problem(rng)
        if split_of(problem[0]) == split and problem[0] not in seen:
            seen.add(problem[0])
            yield problem


class WordProblems(GeneratedProblems):
    """Arithmetic word problems, generated on the spot."""

    source = "word_problems"

    def load(self) -> list[Problem]:
        """Returns the problems, the same ones at every call."""
        problems = []
        for index, (question, start, steps) in zip(
            range(self.num), draw_split(self.split, self.seed), strict=False
        ):
            worked = work_out(start, steps)
            problems.append(
                Problem(
                    problem_id=f"{self.source}/{self.split}/{self.seed}/{index}",
                    question=question,
                    reference_answer=str(worked[-1][-1]),
                    reference_solution=write_solution(worked),
                    split=self.split,
                    source=self.source,
                    metadata={"num_calculations": len(worked)},
                )
            )
        return problems
