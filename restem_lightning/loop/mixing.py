"""What the M-step trains on beside this iteration's accepted completions."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.compute as pc

from restem_lightning.errors import UserError
from restem_lightning.problems import Problem
from restem_lightning.prompts import PromptTemplate, encode_answer
from restem_lightning.selection import ACCEPTED_SCHEMA, ROW_GROUP

Human = Literal["none", "all", "solved"]
_ADDRESS = ("problem_id", "iteration", "completion_index")


@dataclass(frozen=True, kw_only=True)
class MixParams:
    """What the M-step trains on beside this iteration's accepted completions.

    Args:
        human: whose reference solutions are added, one sequence each: "none", "all" problems with
            one, or those "solved", i.e. with an accepted completion in this iteration.
        human_weight: weight of such a sequence in the loss; above 0.
        earlier: whether what earlier iterations accepted is added, with its weights.
        model: whether accepted completions are trained on at all; without them and with human
            "solved" the M-step sees human solutions of the very problems that the policy solves.
    """

    human: Human = "none"
    human_weight: float = 1.0
    earlier: bool = False
    model: bool = True

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            UserError: a value is not allowed.
        """
        if self.human not in get_args(Human):
            raise UserError(f"mix.human ({self.human}) must be one of {', '.join(get_args(Human))}")
        if not self.human_weight > 0:
            raise UserError(f"mix.human_weight ({self.human_weight}) must be above 0")
        if self.human == "none" and not self.model:
            raise UserError("mix.model (false) leaves nothing to train on; set mix.human")


def mix(
    accepted: Iterable[pa.Table],
    params: MixParams,
    *,
    problems: Sequence[Problem],
    template: PromptTemplate,
    tokenizer: Any,
    earlier: Iterable[pa.Table] = (),
) -> Iterator[pa.Table]:
    """Yields what the M-step trains on, in tables of ACCEPTED_SCHEMA.

    The order is: this iteration's completions, those of earlier iterations, human solutions. A
    completion that was accepted in several iterations (from one pool) is there once.

    Args:
        accepted: of this iteration, in pieces.
        params: the settings.
        problems: all training problems.
        template: makes the prompts of human solutions.
        tokenizer: of the policy.
        earlier: the accepted datasets of earlier iterations, oldest first, in pieces.
    """
    wants_earlier = params.model and params.earlier
    seen, solved = _Addresses(), set()
    for table in accepted:
        solved.update(pc.unique(table["problem_id"]).to_pylist())
        if wants_earlier:
            seen.add(table)
        if params.model:
            yield table
    for table in earlier if wants_earlier else ():
        # A human solution is of iteration 0; it is added anew below.
        table = table.filter(pc.not_equal(table["iteration"], 0))
        yield table.filter(seen.add(table))
    if params.human != "none":
        wanted = [one for one in problems if params.human == "all" or one.problem_id in solved]
        yield from human_solutions(wanted, template, tokenizer, params.human_weight)


def human_solutions(
    problems: Sequence[Problem], template: PromptTemplate, tokenizer: Any, weight: float
) -> Iterator[pa.Table]:
    """Yields the reference solutions of problems as sequences to train on, piece by piece.

    The solution is put as the template's `render_answer(solution)` puts it, if it has that method,
    and its tokens are apart from the prompt's, as a policy would write them.
    """
    render = getattr(template, "render_answer", str)
    for first in range(0, len(problems), ROW_GROUP):
        rows = []
        for problem in problems[first : first + ROW_GROUP]:
            if problem.reference_solution is None:
                continue
            text = render(problem.reference_solution)
            prompt_ids, completion_ids = encode_answer(template, problem, tokenizer, text)
            rows.append(
                {
                    "iteration": 0,
                    "problem_id": problem.problem_id,
                    "completion_index": 0,
                    "prompt_ids": prompt_ids,
                    "completion_ids": completion_ids,
                    "text": text,
                    "logprobs": [],
                    "weight": weight,
                }
            )
        yield pa.Table.from_pylist(rows, schema=ACCEPTED_SCHEMA)


class _Addresses:
    """A set of completions; in memory is, of each problem, one bit for each that it might have."""

    def __init__(self) -> None:
        """Begins empty."""
        self._bits: dict[tuple[int, int], int] = {}  # of an iteration and a completion_index
        self._seen: dict[str, int] = defaultdict(int)

    def add(self, table: pa.Table) -> pa.Array:
        """Adds the rows of a table and returns of each whether it was not there before."""
        columns = (table[name].to_pylist() for name in _ADDRESS)
        is_new = []
        for problem_id, *one in zip(*columns, strict=True):
            bit = self._bits.setdefault(tuple(one), 1 << len(self._bits))
            is_new.append(not self._seen[problem_id] & bit)
            self._seen[problem_id] |= bit
        return pa.array(is_new, pa.bool_())
