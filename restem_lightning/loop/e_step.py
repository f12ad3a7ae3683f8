"""The E-step: problems -> sampled, verified completions -> parquet parts; resumable anywhere."""

import hashlib
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from restem_lightning.completion_store import CompletionStore
from restem_lightning.completions import Completion
from restem_lightning.errors import UserError
from restem_lightning.loop.pool_cache import shared_pool
from restem_lightning.loop.progress import Bar, Progress
from restem_lightning.loop.ranks import any_rank, group_store, is_rank_zero, wait_for_files
from restem_lightning.loop.stage import Stage, verified_completions
from restem_lightning.loop.stop_request import Stopped
from restem_lightning.problems import Problem
from restem_lightning.prompts import template_hash
from restem_lightning.selection import SelectionParams
from restem_lightning.verifiers import VerifierPool, check_references


@dataclass(frozen=True, kw_only=True)
class EStepParams:
    """How the E-step is cut into pieces and guarded; none of this changes what is accepted.

    Args:
        problems_per_part: problems in a parquet part, the piece of work that a rank claims and that
            a kill can cost.
        max_error_rate: the run stops when more than this share of the verdicts is ERROR (after 200
            of them): a broken verifier must not look like a weak policy.
        stop_at_quota: draw a problem's completions in turns, first as many as may be accepted, and
            no more of them once selection.max_per_problem are; for selection.select first. The
            accepted dataset stays the same (as any rerun's: where engine.batch_invariant holds).
            The pool is smaller, of easy problems above all: the acceptance rate is higher, the
            share of correct verdicts lower, and neither compares with a run without it. It saves
            time where there are many more problems than engine.max_batch_size, so that waiting for
            verdicts does not leave the batch empty.
        pool_cache: folder in which runs share finished pools of completions (of E-steps and of
            evaluations): what a run with equal policy, problems, sampling settings, seed and
            verifier has drawn there is linked, not drawn again; null to draw all.
        parity_completions: the first so many completions of each E-step are scored again by the
            trainer's own forward pass, and a warning is shown where its log-probabilities are not
            those that the sampler recorded; 0 for none.
    """

    problems_per_part: int = 32
    max_error_rate: float = 0.2
    stop_at_quota: bool = False
    pool_cache: str | None = None
    parity_completions: int = 32

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            UserError: a value is not allowed.
        """
        for name, least in (("problems_per_part", 1), ("parity_completions", 0)):
            if getattr(self, name) < least:
                raise UserError(f"e_step.{name} ({getattr(self, name)}) must be at least {least}")
        if not 0 <= self.max_error_rate <= 1:
            raise UserError(f"e_step.max_error_rate ({self.max_error_rate}) must be from 0 to 1")


def pool_key(
    stage: Stage,
    problems: list[Problem],
    *,
    problems_per_part: int,
    quota: SelectionParams | None = None,
) -> dict[str, Any]:
    """Returns all that determines a pool of completions."""
    content = json.dumps([vars(problem) for problem in problems], sort_keys=True)
    key = {
        "seed": stage.seed,
        "iteration": stage.iteration,
        "first_index": stage.first_index,
        "purpose": stage.purpose,
        "policy_hash": stage.policy.hash,
        "sampling": asdict(stage.params),
        "prompt_hash": template_hash(stage.template, stage.policy.tokenizer),
        "verifier": stage.verifier,
        "scoring": stage.scoring.key() if stage.scoring and stage.is_e_step else None,
        "dtype": str(stage.policy.sampler.dtype),
        "num_problems": len(problems),
        "problems_hash": hashlib.sha256(content.encode()).hexdigest(),
        "problems_per_part": problems_per_part,
        "stop_at_quota": None,
    }
    if quota is not None:  # a pool that lacks what another quota needs must not serve it
        names = ("threshold", "max_per_problem", "dedupe", "quota", "probe")
        key["stop_at_quota"] = {name: getattr(quota, name) for name in names}
    return key


def fill_store(
    store: CompletionStore,
    problems: list[Problem],
    stage: Stage,
    *,
    e_step: EStepParams,
    quota: SelectionParams | None = None,
    show: str = "E-step",
    on_part: Callable[[], None] | None = None,
) -> None:
    """Draws what a store still lacks, part by part; every rank must call it, and all end together.

    Parts are claimed from the process group's store, so a fast rank takes more of them.

    Args:
        store: where the parts go; bound to these settings.
        problems: in a fixed order; consecutive ones share a part.
        stage: what draws and judges.
        e_step: the size of the parts and the alarm.
        quota: see `verified_completions`.
        show: title of the progress bar.
        on_part: called after each part that this rank has written.

    Raises:
        Stopped: a rank was told to stop; the parts that are finished are saved.
        UserError: the store was made with other settings, or the verifier is broken.
    """
    size = e_step.problems_per_part
    parts = [problems[first : first + size] for first in range(0, len(problems), size)]
    key = pool_key(stage, problems, problems_per_part=size, quota=quota)
    if is_rank_zero():
        store.check_key(key)
    judged_by = {**key, "verifiers": stage.verifiers.record}
    with shared_pool(
        e_step.pool_cache, store, judged_by, num_parts=len(parts), is_leaving=stage.is_leaving
    ):
        _draw_missing(store, parts, stage, e_step=e_step, quota=quota, show=show, on_part=on_part)


def _draw_missing(
    store: CompletionStore,
    parts: list[list[Problem]],
    stage: Stage,
    *,
    e_step: EStepParams,
    quota: SelectionParams | None,
    show: str,
    on_part: Callable[[], None] | None,
) -> None:
    """Draws the parts that are not in a store; arguments as those of `fill_store`."""
    part_of = {p.problem_id: number for number, part in enumerate(parts) for p in part}
    done = {part.index for part in store.parts()}
    claimed = claims(f"{stage.purpose}{stage.iteration}/{stage.first_index}", len(parts))

    def wanted() -> Iterator[Problem]:
        for number in claimed:
            if number not in done:
                yield from parts[number]

    progress, start = Progress(), time.monotonic()
    collected: dict[int, list[Completion]] = defaultdict(list)
    num_done: Counter[int] = Counter()
    left = sum(len(part) for number, part in enumerate(parts) if number not in done)
    left *= stage.params.n
    with Bar(show, left) as bar:
        for completion, is_last, num_skipped in verified_completions(wanted(), stage, quota=quota):
            progress.add(completion)
            progress.check(e_step.max_error_rate, completion)
            number = part_of[completion.problem_id]
            collected[number].append(completion)
            num_done[number] += is_last
            if num_done[number] == len(parts[number]):
                whole = _in_order(collected.pop(number), parts[number])
                store.write_part(number, _scored(whole, parts[number], stage))
                if on_part is not None:
                    on_part()
            bar.total -= num_skipped
            bar.set_postfix_str(progress.summary(time.monotonic() - start), refresh=False)
            bar.update()
            if stage.should_stop():
                break
    if any_rank(stage.should_stop(), stage.is_leaving):
        raise Stopped
    # Else a selection could leave another node's parts out.
    wait_for_files(store.folder, {store.entry_path(number).name for number in range(len(parts))})


def _scored(
    completions: list[Completion], problems: list[Problem], stage: Stage
) -> list[Completion]:
    """Returns completions with the verdict of the learned verifier too, where there is one."""
    if stage.scoring is None or not stage.is_e_step:
        return completions
    by_id = {problem.problem_id: problem for problem in problems}
    return stage.scoring.apply([(by_id[one.problem_id], one) for one in completions])


def _in_order(completions: list[Completion], problems: list[Problem]) -> list[Completion]:
    """Returns completions in order of their problems, then of their indices."""
    place = {problem.problem_id: place for place, problem in enumerate(problems)}
    return sorted(completions, key=lambda one: (place[one.problem_id], one.completion_index))


def claims(name: str, num_parts: int) -> Iterator[int]:
    """Yields the parts that this rank works on, one at a time, each part to one rank only."""
    store = group_store()
    if store is None:
        yield from range(num_parts)
        return
    while (number := store.add(f"restem/{name}", 1) - 1) < num_parts:
        yield number


def prepare_problems(
    problems: list[Problem], verifiers: VerifierPool, *, name: str, warn: Callable[[str], None]
) -> list[Problem]:
    """Returns the problems whose own reference the verifier accepts.

    Args:
        problems: as loaded.
        verifiers: a drained pool.
        name: of the set, for messages.
        warn: takes the lines about what was dropped.

    Raises:
        UserError: there is no problem, none has a reference, or the verifier accepts none.
    """
    if not problems:
        raise UserError(f"{name} is empty; check its path, split and num")
    kept, dropped = check_references(problems, verifiers)
    if not kept:
        problem, verdict = dropped[0]
        raise UserError(
            f"{name}: the verifier accepts the reference of none of the {len(problems)} "
            f"problems ({problem.problem_id}: {verdict.kind.value}, {verdict.detail}); give "
            "problems with reference answers, or the verifier that fits them"
        )
    for problem, verdict in dropped[:5]:
        warn(
            f"{name}: {problem.problem_id} is dropped, its own reference is judged "
            f"{verdict.kind.value} ({verdict.detail})"
        )
    if len(dropped) > 5:
        warn(f"{name}: {len(dropped) - 5} more are dropped for the same kind of reason")
    return kept
