"""The table of a comparison: outcomes of all runs, their intervals and the paired tests."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from restem_lightning.compare.statistics import crossed_bootstrap, mcnemar
from restem_lightning.completion_store import CompletionStore
from restem_lightning.completions import VerdictKind
from restem_lightning.errors import UserError
from restem_lightning.metrics import pass_at_k
from restem_lightning.run_dir import RunDir, read_json

BASE = "base model"
FOOTNOTE = (
    "Percent of problems [95 % interval: bootstrap over problems and seeds]. McNemar: exact over "
    "problems, each counted for the side that solves it with more seeds. Bootstrap: paired, over "
    "problems and seeds. No p-value is corrected for the number of arms. Samples, completions "
    "trained on and optimizer steps: of all iterations, mean over seeds."
)
_HEAD = (
    "arm", "seeds", "greedy pass@1", "pass@k", "difference", "better/worse", "p McNemar",
    "p bootstrap", "samples", "trained on", "optimizer steps",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one policy did on the evaluation set.

    Args:
        greedy: problem_id -> whether the greedy completion is CORRECT; empty if not drawn.
        sampled: problem_id -> (completions, CORRECT ones); empty if none were drawn.
        metrics: metric -> value, as the run measured them.
        budget: what the run took until then: samples, trained_on, optimizer_steps.
    """

    greedy: dict[str, bool]
    sampled: dict[str, tuple[int, int]]
    metrics: dict[str, float]
    budget: dict[str, int]


def read_outcome(folder: Path, evaluation_set: str, *, iteration: int | None = None) -> Outcome:
    """Returns what the policy of an iteration did on an evaluation set.

    Args:
        folder: the run folder.
        evaluation_set: its name.
        iteration: 0 for the base model; the last finished one if None.

    Raises:
        UserError: no iteration is finished, or it has not been measured on that set.
    """
    run = RunDir(folder)
    last = iteration if iteration is not None else run.resume_iteration() - 1
    paths = run.iteration(last)
    if (iteration is None and last == 0) or not paths.metrics.exists():
        raise UserError(f"{folder} has no finished iteration")
    measured = read_json(paths.metrics)["evaluation"]
    if evaluation_set not in measured:
        raise UserError(
            f"evaluation_set ({evaluation_set}) is not in {paths.metrics}, which has "
            f"{', '.join(measured) or 'none'}"
        )
    counts = {
        kind: _counts(paths.path / "evaluation" / evaluation_set / kind)
        for kind in ("greedy", "sampled")
    }
    return Outcome(
        greedy={name: correct == 1 for name, (_, correct) in counts["greedy"].items()},
        sampled=counts["sampled"],
        metrics={name: one["value"] for name, one in measured[evaluation_set].items()},
        budget=_budget(run, last),
    )


def check_problems(outcome: Outcome, first: Outcome) -> None:
    """Does nothing if two policies were measured on the same problems.

    Raises:
        UserError: they were not, so they cannot be paired.
    """
    mine, others = (set(one.greedy or one.sampled) for one in (outcome, first))
    if mine != others:
        raise UserError(
            f"it was measured on {len(mine)} problems, the first run on {len(others)}, "
            f"{len(mine & others)} of them the same; give all arms the same evaluation set"
        )


def compare_outcomes(
    outcomes: dict[str, dict[int, Outcome]], control: str
) -> dict[str, dict[str, Any]]:
    """Returns the row of each arm: means with intervals, and the tests against the control.

    Args:
        outcomes: arm -> seed -> outcome; all on the same problems, see `check_problems`.
        control: the arm that the others are tested against.
    """
    return {
        arm: _row(by_seed, outcomes.get(control, {}) if arm != control else {})
        for arm, by_seed in outcomes.items()
        if by_seed
    }


def text_table(rows: dict[str, dict[str, Any]], *, control: str) -> str:
    """Returns the rows as a plain-text table with its footnote."""
    cells = cells_of(rows, control=control)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return "\n".join([*lines, "", FOOTNOTE])


def cells_of(rows: dict[str, dict[str, Any]], *, control: str) -> list[list[str]]:
    """Returns the head and the rows of the table as text."""
    names = {name for row in rows.values() for name in row["metrics"] if name.startswith("pass@")}
    largest = max(names, key=lambda name: int(name.partition("@")[2]), default="pass@k")
    head = [largest if name == "pass@k" else name for name in _HEAD]
    head[4] = f"less {control}"
    table = [head]
    for arm, row in rows.items():
        versus, metrics, budget = row["versus_control"], row["metrics"], row["budget"]
        tests = ["-"] * 4
        if "greedy" in versus:
            sign = versus["mcnemar"]
            tests = [
                _interval(versus["greedy"], signed=True),
                f"{sign['num_better']}/{sign['num_worse']}",
                _p(sign["p"]),
                _p(versus["greedy"]["p"]),
            ]
        table.append(
            [
                arm,
                str(len(row["seeds"])),
                _interval(metrics.get("greedy_pass@1")),
                _interval(metrics.get(largest)),
                *tests,
                *(f"{round(value):,}" for value in budget.values()),
            ]
        )
    return table


def _counts(folder: Path) -> dict[str, tuple[int, int]]:
    """Returns problem_id -> (completions, CORRECT ones) of a pool; nothing if there is none."""
    num, num_correct = defaultdict(int), defaultdict(int)
    for batch in CompletionStore(folder).iter_batches(["problem_id", "verdict"]):
        for row in batch.to_pylist():
            num[row["problem_id"]] += 1
            num_correct[row["problem_id"]] += row["verdict"] == VerdictKind.CORRECT.value
    return {name: (num[name], num_correct[name]) for name in num}


def _budget(run: RunDir, last: int) -> dict[str, int]:
    """Returns what iterations 1 .. last drew, trained on and how long, drawn by them or linked."""
    folders = [run.iteration(number) for number in range(1, last + 1)]
    metrics = [read_json(paths.metrics) for paths in folders]
    parts = [
        part
        for paths in folders  # those of a balance score are samples too
        for folder in (paths.completions, paths.path / "balance")
        for part in folder.rglob("part-*.json")
    ]
    return {
        "samples": sum(read_json(part)["num_rows"] for part in parts),
        "trained_on": sum(one["e_step"].get("num_trained_on", 0) for one in metrics),
        "optimizer_steps": sum(one["m_step"].get("optimizer_steps", 0) for one in metrics),
    }


def _row(by_seed: dict[int, Outcome], control: dict[int, Outcome]) -> dict[str, Any]:
    seeds = sorted(by_seed)
    shared = [seed for seed in seeds if seed in control]
    row: dict[str, Any] = {
        "seeds": seeds,
        "metrics": {
            name: asdict(crossed_bootstrap(values_SP))
            for name, values_SP in _values(by_seed, seeds).items()
        },
        "by_seed": {seed: by_seed[seed].metrics for seed in seeds},
        "budget": {
            name: float(np.mean([one.budget[name] for one in by_seed.values()]))
            for name in by_seed[seeds[0]].budget
        },
        "versus_control": {},
    }
    for estimate in row["metrics"].values():
        del estimate["p"]  # that a rate is not 0 is no question
    mine, theirs = _values(by_seed, shared), _values(control, shared)
    for name in mine.keys() & theirs.keys() if shared else ():
        key = "greedy" if name == "greedy_pass@1" else name
        row["versus_control"][key] = asdict(crossed_bootstrap(mine[name] - theirs[name]))
    if "greedy" in row["versus_control"]:
        arm_SP, control_SP = mine["greedy_pass@1"], theirs["greedy_pass@1"]
        row["versus_control"]["mcnemar"] = asdict(mcnemar(arm_SP, control_SP))
        row["versus_control"]["mcnemar_by_seed"] = {
            seed: asdict(mcnemar(arm_SP[i : i + 1], control_SP[i : i + 1]))
            for i, seed in enumerate(shared)
        }
    return row


def _values(by_seed: dict[int, Outcome], seeds: Sequence[int]) -> dict[str, np.ndarray]:
    """Returns metric -> value of each problem, shape (S, P), problems in order of their id."""
    runs = [by_seed[seed] for seed in seeds]
    values = {}
    if runs and all(run.greedy for run in runs):
        rows = [[run.greedy[name] for name in sorted(run.greedy)] for run in runs]
        values["greedy_pass@1"] = np.array(rows, dtype=np.float64)
    if runs and all(run.sampled for run in runs):
        counts = np.array([[run.sampled[name] for name in sorted(run.sampled)] for run in runs])
        n = int(counts[..., 0].min())
        for k in sorted({1, n}):
            rows = [pass_at_k(one[:, 0], one[:, 1], k) for one in counts]
            values[f"pass@{k}"] = np.stack(rows)
    return values


def _interval(estimate: dict[str, Any] | None, *, signed: bool = False) -> str:
    if estimate is None:
        return "-"
    value, low, high = (100 * estimate[key] for key in ("value", "low", "high"))
    sign = "+" if signed else ""
    return f"{value:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def _p(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"
