"""Temperature and threshold of a round, chosen by the balance score before anything is drawn."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from restem_lightning.completion_store import CompletionStore
from restem_lightning.completions import VerdictKind
from restem_lightning.errors import UserError
from restem_lightning.loop.draw import problems_of_e_step
from restem_lightning.loop.e_step import EStepParams, fill_store
from restem_lightning.loop.ranks import barrier, is_missing, is_rank_zero
from restem_lightning.loop.stage import Stage
from restem_lightning.problems import Problem
from restem_lightning.run_dir import read_json, write_json
from restem_lightning.selection import balance_score, passes


@dataclass(frozen=True, kw_only=True)
class BalanceParams:
    """Choice of sampling.temperature and selection.threshold before each E-step; off if empty.

    Args:
        temperatures: to choose from; empty for sampling.temperature alone.
        thresholds: to choose from; empty for selection.threshold alone.
        num_problems: problems of the E-step, drawn anew in each, that each temperature is tried on.
        num_wanted: distinct correct completions of a problem that are enough.
    """

    temperatures: tuple[float, ...] = ()
    thresholds: tuple[float, ...] = ()
    num_problems: int = 600
    num_wanted: int = 6

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            UserError: a value is not allowed.
        """
        for name in ("num_problems", "num_wanted"):
            if getattr(self, name) < 1:
                raise UserError(f"balance.{name} ({getattr(self, name)}) must be at least 1")

    def is_on(self) -> bool:
        """Returns whether there is anything to choose."""
        return bool(self.temperatures or self.thresholds)


def choose_balance(
    folder: Path,
    problems: Sequence[Problem],
    stage: Stage,
    params: BalanceParams,
    *,
    threshold: float | str,
    e_step: EStepParams,
    on_part: Callable[[], None] | None = None,
) -> tuple[float, float | str]:
    """Returns the temperature and the threshold of the highest score; a tie goes to the first.

    Every rank must call it. What it finds is kept in balance.json, so a resumed run asks it.

    Args:
        folder: gets a store for each temperature, and balance.json.
        problems: of the E-step.
        stage: how the E-step draws.
        params: the candidates.
        threshold: selection.threshold, the only candidate if params has none.
        e_step: size of parts, alarm.
        on_part: called after each part that this rank has written.
    """
    record = folder / "balance.json"
    if is_missing(record, stage.is_leaving):
        # The first ones of a sorted data set would be of one subject.
        some = problems_of_e_step(
            problems, params.num_problems, e_step_index=stage.iteration - 1, seed=stage.seed
        )
        scores = []
        for temperature in params.temperatures or (stage.params.temperature,):
            store = CompletionStore(folder / f"temperature_{temperature:g}")
            fill_store(
                store,
                some,
                replace(
                    stage,
                    params=replace(stage.params, temperature=temperature),
                    purpose=f"balance/{temperature:g}/",
                ),
                e_step=e_step,
                show=f"balance T {temperature:g}",
                on_part=on_part,
            )
            barrier(stage.is_leaving)
            for one in params.thresholds or (threshold,):
                score = balance_score(count_selected(store, one), params.num_wanted)
                scores.append({"temperature": temperature, "threshold": one, "score": score})
        if is_rank_zero():
            best = max(scores, key=lambda row: row["score"])
            write_json(record, {**best, "scores": scores})
        barrier(stage.is_leaving, written=record)
    best = read_json(record)
    return best["temperature"], best["threshold"]


def count_selected(store: CompletionStore, threshold: float | str) -> list[tuple[int, int]]:
    """Returns, for each problem, how many distinct texts pass, and how many of these are correct.

    So with a binary reward all that is selected is correct, as the source of the score has it.
    """
    selected = []
    for part in store.iter_parts(["problem_id", "verdict", "reward", "finish_reason", "text"]):
        texts: dict[str, dict[str, bool]] = defaultdict(dict)
        for row in part.to_pylist():
            kind, some = VerdictKind(row["verdict"]), texts[row["problem_id"]]
            if row["finish_reason"] != "length" and passes(kind, row["reward"], threshold):
                some[row["text"]] = kind is VerdictKind.CORRECT
        selected += [(len(some), sum(some.values())) for some in texts.values()]
    return selected
