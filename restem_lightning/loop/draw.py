"""The pools of an E-step: which policies draw, on which problems, and once more with a hint."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from restem_lightning.completion_store import CompletionStore
from restem_lightning.errors import UserError
from restem_lightning.loop.e_step import EStepParams, fill_store
from restem_lightning.loop.ranks import barrier
from restem_lightning.loop.stage import Policy, Stage, load_policy
from restem_lightning.loop.weights import release_memory
from restem_lightning.problems import Problem
from restem_lightning.prompts import PromptTemplate
from restem_lightning.sampler import EngineParams
from restem_lightning.selection import HINT, SelectionParams, solved_problems


@dataclass(frozen=True, kw_only=True)
class DrawParams:
    """What an E-step draws from whom.

    Args:
        policies: what samples: "previous" (the policy before; the base model in iteration 1),
            "base", a policy folder, or a list of these. Each one draws sampling.n completions of
            each problem, and selection unites them. Its tokenizer must be the base model's.
        num_problems: problems of an E-step, the next ones of an endless seeded shuffle; null for
            all of them, 0 to draw nothing (then only `mix` gives the M-step data).
        reuse_pool: draw nothing and select from the pool of the iteration before.
    """

    policies: str | list[str] = "previous"
    num_problems: int | None = None
    reuse_pool: bool = False

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            UserError: a value is not allowed.
        """
        if not self.policies:
            raise UserError("draw.policies (empty) must name at least one policy; set previous")
        if self.num_problems is not None and self.num_problems < 0:
            raise UserError(f"draw.num_problems ({self.num_problems}) must be at least 0, or null")

    def names(self) -> list[str]:
        """Returns the names of the policies."""
        return [self.policies] if isinstance(self.policies, str) else list(self.policies)


def problems_of_e_step(
    problems: Sequence[Problem], num: int | None, *, e_step_index: int, seed: int
) -> list[Problem]:
    """Returns the problems of one E-step, in the order of the run's problems.

    Args:
        problems: all of them.
        num: how many, None for all.
        e_step_index: 0 for the first E-step; each takes the next `num` of an endless shuffle.
        seed: of the shuffle.
    """
    if num is None or num == 0:
        return list(problems) if num is None else []
    num = min(num, len(problems))
    taken: list[int] = []
    shuffle, place = divmod(e_step_index * num, len(problems))
    while len(taken) < num:
        order = random.Random(f"{seed}/{shuffle}").sample(range(len(problems)), len(problems))
        # A window across two shuffles must not hold a problem twice.
        rest = [index for index in order[place:] if index not in taken]
        taken += rest[: num - len(taken)]
        shuffle, place = shuffle + 1, 0
    return [problems[index] for index in sorted(taken)]


def pool_stores(
    folder: Path, *, num_policies: int, has_hint: bool
) -> tuple[list[CompletionStore], CompletionStore | None]:
    """Returns the stores of an E-step: one for each policy, and that of the hint if there is one.

    Args:
        folder: `completions` of the iteration; the first policy's store is the folder itself.
        num_policies: policies that draw.
        has_hint: whether unsolved problems are drawn once more with a hint.
    """
    others = [folder / f"policy_{number}" for number in range(2, num_policies + 1)]
    hint = CompletionStore(folder / "hint") if has_hint else None
    return [CompletionStore(path) for path in (folder, *others)], hint


def draw_pools(
    folder: Path,
    problems: list[Problem],
    *,
    policies: Sequence[str],
    stage_of: Callable[[Policy], Stage],
    hint: PromptTemplate | None,
    selection: SelectionParams,
    engine: EngineParams,
    e_step: EStepParams,
    show: str,
    on_part: Callable[[], None],
) -> None:
    """Draws what the pools of an E-step still lack; every rank must call it.

    Args:
        folder: `completions` of the iteration.
        problems: of this E-step.
        policies: folders, one after the other; the first one draws with the hint.
        stage_of: how a loaded policy draws.
        hint: prompt for the problems that nothing acceptable was drawn of, None for no such pass.
        selection: says what is acceptable, and the quota.
        engine: how the sampler uses the machine.
        e_step: size of parts, alarm, quota.
        show: title of the progress bar.
        on_part: called after each part that this rank has written.
    """
    stores, hint_store = pool_stores(folder, num_policies=len(policies), has_hint=hint is not None)
    quota = selection if e_step.stop_at_quota else None

    def fill(store: CompletionStore, some: list[Problem], stage: Stage, title: str) -> None:
        fill_store(store, some, stage, e_step=e_step, quota=quota, show=title, on_part=on_part)
        barrier(stage.is_leaving)

    def draw_with_hint(policy: Policy) -> None:
        solved = solved_problems(stores, selection)
        unsolved = [problem for problem in problems if problem.problem_id not in solved]
        stage = stage_of(policy)
        first = len(stores) * stage.params.n
        hinted = replace(stage, template=hint, purpose=HINT, first_index=first)
        if unsolved:
            fill(hint_store, unsolved, hinted, f"{show} hint")

    for place, (name, store) in reversed(list(enumerate(zip(policies, stores, strict=True)))):
        policy = load_policy(name, engine)
        stage = stage_of(policy)
        fill(store, problems, replace(stage, first_index=place * stage.params.n), show)
        if place == 0 and hint is not None:
            draw_with_hint(policy)
        del policy, stage
        release_memory()
