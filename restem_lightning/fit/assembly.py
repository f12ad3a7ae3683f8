"""From configured objects to what the iterations share: problems checked, the Loop made."""

import sys
from dataclasses import asdict, replace
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from restem_lightning.loop.e_step import prepare_problems
from restem_lightning.loop.shared import Loop
from restem_lightning.loop.stop_request import StopRequest
from restem_lightning.loop.tracking import Tracker
from restem_lightning.problems import Problem, check_splits, without_questions_of
from restem_lightning.run_dir import RunDir
from restem_lightning.verifiers import VerifierPool


def load_problems(made: Any, verifiers: VerifierPool) -> dict[str, list[Problem]]:
    """Returns the checked problems: train, validation, and each held-out set by its name."""
    sources = {"train": made.problems.train, **made.problems.held_out}
    if made.problems.validation is not None:
        sources["validation"] = made.problems.validation
    problems = {name: source.load() for name, source in sources.items()}
    check_splits(problems)
    others = [problem for name in made.problems.held_out for problem in problems[name]]
    for name in ("validation", "train"):
        if name in problems:
            problems[name] = _apart(name, problems[name], others)
            others += problems[name]
    return {
        name: prepare_problems(some, verifiers, name=f"problems.{name}", warn=say)
        for name, some in problems.items()
    }


def _apart(name: str, problems: list[Problem], others: list[Problem]) -> list[Problem]:
    """Returns the problems that no set they must be unknown to asks as well."""
    kept, dropped = without_questions_of(problems, others)
    if dropped:
        say(
            f"problems.{name}: {len(dropped)} of {len(problems)} are dropped, a set that measures "
            f"asks the same ({dropped[0].problem_id})"
        )
    return kept


def make_loop(
    made: Any,
    problems: dict[str, list[Problem]],
    *,
    run: RunDir,
    base: str,
    seed: int,
    verifiers: VerifierPool,
    tracker: Tracker,
    stop: StopRequest,
) -> Loop:
    """Puts together what the iterations share."""
    return Loop(
        run=run,
        base=base,
        seed=seed,
        train=problems["train"],
        validation=problems.get("validation", []),
        held_out={name: problems[name] for name in made.problems.held_out},
        template=made.prompt,
        verifiers=verifiers,
        sampling=made.sampling,
        validation_sampling=replace(made.sampling, **asdict(made.validation), min_p=0.0),
        engine=made.engine,
        draw=made.draw,
        hint=made.hint,
        balance=made.balance,
        e_step=made.e_step,
        scoring=made.scoring,
        selection=made.selection,
        mix=made.mix,
        carry_optimizer=made.carry_optimizer,
        evaluation=made.evaluation,
        tracker=tracker,
        stop=stop,
    )


@rank_zero_only
def say(text: str) -> None:
    """Shows a line on rank 0."""
    print(f"restem fit: {text}", file=sys.stderr)
