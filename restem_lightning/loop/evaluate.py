"""Evaluation of one policy: greedy pass@1, unbiased pass@k and maj@k with 95 % intervals."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from restem_lightning.completion_store import CompletionStore
from restem_lightning.completions import VerdictKind
from restem_lightning.errors import UserError
from restem_lightning.loop.e_step import EStepParams, fill_store
from restem_lightning.loop.stage import Stage, verified_completions
from restem_lightning.metrics import evaluate_table
from restem_lightning.problems import Problem
from restem_lightning.sampler import SamplingParams


@dataclass(frozen=True, kw_only=True)
class EvaluationParams:
    """How a policy is measured on held-out problems.

    Args:
        greedy: whether to measure greedy pass@1.
        n: sampled completions per problem for pass@k and maj@k; 0 for none.
        ks: the k of pass@k, each at most n.
        temperature: of the sampled completions (the paper: 1.0).
        top_k: of the sampled completions, 0 for all (the paper: none).
        top_p: of the sampled completions (the paper: 0.95).
    """

    greedy: bool = True
    n: int = 0
    ks: tuple[int, ...] = (1,)
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.95

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            UserError: a value is not allowed.
        """
        if self.n < 0:
            raise UserError(f"evaluation.n ({self.n}) must be at least 0")
        if self.n and not all(1 <= k <= self.n for k in self.ks):
            raise UserError(f"evaluation.ks ({list(self.ks)}) must lie from 1 to n ({self.n})")
        if self.n > 1 and self.temperature <= 0:
            raise UserError(
                f"evaluation.temperature ({self.temperature}) must be above 0 for n {self.n}"
            )

    def stages(self, sampling: SamplingParams) -> dict[str, SamplingParams]:
        """Returns the sampling settings of the greedy and of the sampled stage, those wanted.

        Args:
            sampling: of the E-step; gives max_new_tokens and the stop strings.
        """
        stages = {}
        if self.greedy:
            stages["greedy"] = replace(
                sampling, n=1, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0
            )
        if self.n:
            stages["sampled"] = replace(
                sampling,
                n=self.n,
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                min_p=0.0,
            )
        return stages


@dataclass(frozen=True, kw_only=True)
class ValidationParams:
    """How D_val is sampled inside the M-step; max_new_tokens and stop are those of the E-step.

    Args:
        n: completions per problem; the mean reward counts.
        temperature: 0 for greedy.
        top_k: 0 for all.
        top_p: 1 for all.
    """

    n: int = 1
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


def draw_evaluation(
    folder: Path,
    name: str,
    problems: list[Problem],
    evaluation: EvaluationParams,
    stage: Stage,
    *,
    e_step: EStepParams,
    on_part: Callable[[], None] | None = None,
) -> None:
    """Draws the completions of one evaluation set into stores below a folder; resumable.

    All n completions of each problem are drawn: a quota would bias pass@k and maj@k.

    Args:
        folder: gets a store `greedy` and a store `sampled`.
        name: of the set; part of the address of its draws.
        problems: of the set.
        evaluation: what to draw.
        stage: what draws and judges; `params` are those of the E-step.
        e_step: size of parts, alarm.
        on_part: called after each part that this rank has written.
    """
    for kind, params in evaluation.stages(stage.params).items():
        fill_store(
            CompletionStore(folder / kind),
            problems,
            replace(stage, params=params, purpose=f"evaluation/{name}/{kind}/"),
            e_step=e_step,
            show=f"{name} {kind}",
            on_part=on_part,
        )


def measure(folder: Path, evaluation: EvaluationParams) -> dict[str, Any]:
    """Returns the metrics of one evaluation set from its stores, as in metrics.json.

    Args:
        folder: as given to `draw_evaluation`.
        evaluation: what was drawn.
    """
    greedy = [rows[0][0] for rows in _Stored(folder / "greedy")] if evaluation.greedy else []
    samples = _Stored(folder / "sampled") if evaluation.n else ()
    return evaluate_table(samples, greedy, ks=evaluation.ks)


def total_reward(problems: Sequence[Problem], stage: Stage) -> float:
    """Returns the sum of rewards of a policy on problems: what the M-step's stop rule looks at."""
    return sum(judged.completion.verdict.reward for judged in verified_completions(problems, stage))


@dataclass(frozen=True)
class _Stored:
    """For each problem of a store the (correct, extracted) of its completions in order."""

    folder: Path

    def __iter__(self) -> Iterator[list[tuple[bool, str | None]]]:
        """Reads the store, one part in memory at a time."""
        columns = ["problem_id", "completion_index", "verdict", "extracted"]
        for part in CompletionStore(self.folder).iter_parts(columns):
            rows = defaultdict(list)
            for problem_id, index, verdict, extracted in zip(
                *(part[name].to_pylist() for name in columns), strict=True
            ):
                correct = verdict == VerdictKind.CORRECT.value
                rows[problem_id].append((index, correct, extracted))
            for problem in rows.values():
                problem.sort(key=lambda row: row[0])
                yield [(correct, extracted) for _, correct, extracted in problem]
