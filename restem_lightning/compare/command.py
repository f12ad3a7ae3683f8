"""`restem compare`: the command line of a comparison."""

import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from restem_lightning.compare.arms import Arm, ArmRun, limit_threads, plan_runs, run_all
from restem_lightning.compare.table import (
    BASE,
    FOOTNOTE,
    Outcome,
    cells_of,
    check_problems,
    compare_outcomes,
    read_outcome,
    text_table,
)
from restem_lightning.errors import UserError
from restem_lightning.report import write_table
from restem_lightning.run_dir import write_json
from restem_lightning.unknown_options import likely_meant


def compare(words: list[str]) -> None:
    """`restem compare`: runs arms over seeds and prints one table; resumable.

    Raises:
        UserError: for a user's mistake.
    """
    parser = _parser()
    with likely_meant(parser):
        made = parser.instantiate_classes(parser.parse_args(words))
    if made.control not in made.arms:
        raise UserError(f"control ({made.control}) must be one of {', '.join(made.arms)}")
    if BASE in made.arms:
        raise UserError(f"arms must not name one {BASE!r}: that row is always there; rename it")
    if odd := [name for name in made.arms if Path(name).name != name]:
        raise UserError(f"arms ({odd[0]!r}) must be a name of a folder; rename it")
    if made.jobs < 1 or not made.seeds or len(set(made.seeds)) < len(made.seeds):
        raise UserError(
            f"jobs ({made.jobs}) must be at least 1 and seeds ({made.seeds}) at least one, each "
            "once"
        )
    output = Path(made.output)
    runs = plan_runs(
        made.arms,
        seeds=made.seeds,
        configs=made.configs,
        settings=made.settings,
        output=output,
    )
    limit_threads(made.jobs)
    failed = _run_until_stopped(runs, made.jobs)
    outcomes = _outcomes(runs, failed, made)
    rows = compare_outcomes(outcomes, made.control)
    write_json(
        output / "comparison.json",
        {
            "control": made.control,
            "evaluation_set": made.evaluation_set,
            "note": FOOTNOTE,
            "arms": rows,
            "failed": {f"{run.arm}/seed_{run.seed}": why for run, why in failed.items()},
        },
    )
    cells = cells_of(rows, control=made.control)
    title = f"Comparison on {made.evaluation_set}, control {made.control}"
    report = write_table(output / "comparison.html", title, cells, note=FOOTNOTE)
    print(f"\n{text_table(rows, control=made.control)}\n")
    print(f"table   {output / 'comparison.json'}\nreport  {report}")
    for run, why in failed.items():
        print(f"restem compare: {run.arm}, seed {run.seed}: {why}; log {run.log}", file=sys.stderr)
    if failed:
        sys.exit(1)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="restem compare",
        usage="restem compare --config A.yaml [--OPTION VALUE ...]",
        description="Runs arms (methods, controls, choices of settings) over seeds and prints one "
        "table with 95 % intervals and paired tests. Resumable: finished runs are skipped. Arms "
        "that would draw the same samples share them.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these options.")
    parser.add_argument(
        "--arms",
        type=dict[str, Arm],
        required=True,
        help="Name -> {configs: [FILE, ...], settings: {dotted.key: value}} of each arm.",
    )
    parser.add_argument(
        "--control", type=str, required=True, help="The arm that the others are tested against."
    )
    parser.add_argument("--seeds", type=list[int], default=[0, 1, 2], help="Seeds of every arm.")
    parser.add_argument(
        "--configs", type=list[str], default=[], help="YAML files before those of every arm."
    )
    parser.add_argument(
        "--settings",
        type=dict[str, Any],
        default={},
        help="Dotted key -> value for every arm, behind its configs, before its own settings.",
    )
    parser.add_argument(
        "--evaluation_set", type=str, default="held_out", help="Name in problems.held_out."
    )
    parser.add_argument(
        "--output",
        type=str,
        default="runs/compare",
        help="Folder for the runs, the pools that they share, and the table.",
    )
    parser.add_argument("--jobs", type=int, default=1, help="Runs at a time, a process for each.")
    return parser


def _run_until_stopped(runs: Sequence[ArmRun], jobs: int) -> dict[ArmRun, str]:
    """Runs all; at Ctrl-C or a SIGTERM every run saves what it has.

    Both are taken over: a shell starts what it runs in the background with Ctrl-C ignored.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, signal.default_int_handler)
    try:
        return run_all(runs, jobs=jobs, say=lambda text: print(text, file=sys.stderr, flush=True))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _outcomes(
    runs: Sequence[ArmRun], failed: dict[ArmRun, str], made: Any
) -> dict[str, dict[int, Outcome]]:
    """Returns the outcomes of what succeeded, the base model first; adds what cannot be read."""
    outcomes: dict[str, dict[int, Outcome]] = {BASE: {}, **{name: {} for name in made.arms}}
    first: Outcome | None = None
    for run in runs:
        if run in failed:
            continue
        try:
            outcome = read_outcome(run.folder, made.evaluation_set)
            first = first or outcome
            check_problems(outcome, first)
            outcomes[run.arm][run.seed] = outcome
            if run.arm == made.control:
                base = read_outcome(run.folder, made.evaluation_set, iteration=0)
                outcomes[BASE][run.seed] = base
        except UserError as error:
            failed[run] = str(error)
    return outcomes
