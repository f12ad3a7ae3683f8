"""A sweep without W&B's server: its engine chooses the trials, the sweep's own command runs them.

    python -m venv .venv-sweeps && .venv-sweeps/bin/pip install sweeps
    .venv-sweeps/bin/python scripts/sweep_local.py configs/sweeps/iterations_temperature_bayes.yaml
        --python .venv/bin/python [--trials 12] [--output runs/sweeps] [-- WORDS OF RESTEM FIT]

It reads the same YAML as `wandb sweep` and does what `wandb agent` does. W&B's open-source engine
(PyPI: sweeps) wants numpy below 2, so it has an environment of its own; trials run with --python.
Words behind `--` are added to every trial. trials.json keeps what was chosen and measured: the same
command goes on, with an interrupted trial first. Failed trials are kept as failed, not repeated.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

STOPPED = (-2, -9, -15, 75, 130, 143)  # by Ctrl-C, a signal, or the end of an allocation
ENGINE_KEYS = ("method", "metric", "parameters", "early_terminate", "run_cap")


def main() -> None:
    """Runs the sweep and prints its table; exits with 1 if a trial has failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", type=Path, help="the sweep's YAML")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the trials")
    parser.add_argument("--trials", type=int, help="most trials; run_cap of the YAML if not given")
    parser.add_argument("--output", type=Path, default=Path("runs/sweeps"), help="folder of sweeps")
    parser.add_argument("--seed", type=int, default=0, help="of the engine's choices")
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:end], argparse.Namespace(words=words[end + 1 :]))
    import numpy as np
    from sweeps import next_run, schema_violations_from_proposed_config

    sweep = yaml.safe_load(options.sweep.read_text())
    if violations := schema_violations_from_proposed_config(engine_part(sweep)):
        parser.error(f"{options.sweep}: {'; '.join(violations)}")
    most = options.trials or sweep.get("run_cap")
    if most is None and sweep["method"] != "grid":
        parser.error(f"--trials must be given: method {sweep['method']} never ends by itself")
    folder = options.output / options.sweep.stem
    trials = read_trials(folder)
    np.random.seed(options.seed + len(trials))
    while (number := _next_unfinished(trials)) is not None or most is None or len(trials) < most:
        if number is None:
            chosen = next_run(engine_part(sweep), [as_run(trial) for trial in trials])
            if chosen is None:
                break
            parameters = {name: _plain(one["value"]) for name, one in chosen.config.items()}
            number = len(trials)
            trials.append({"parameters": parameters, "state": "running", "metrics": {}})
            _write_trials(folder, trials)
        run_trial(trials[number], sweep, folder, number, options)
        _write_trials(folder, trials)
        print(line_of(trials[number], number, sweep["metric"]["name"]), flush=True)
    print(f"\n{table(trials, sweep)}\n\ntrials  {folder / 'trials.json'}")
    sys.exit(any(trial["state"] == "failed" for trial in trials))


def engine_part(sweep: dict[str, Any]) -> dict[str, Any]:
    """Returns what the engine knows of a sweep: all but how a trial is started."""
    return {key: value for key, value in sweep.items() if key in ENGINE_KEYS}


def as_run(trial: dict[str, Any]) -> Any:
    """Returns a trial as the engine sees it."""
    from sweeps import RunState, SweepRun

    return SweepRun(
        state=RunState[trial["state"]],
        config={name: {"value": value} for name, value in trial["parameters"].items()},
        summary_metrics=trial["metrics"],
    )


def run_trial(
    trial: dict[str, Any],
    sweep: dict[str, Any],
    folder: Path,
    number: int,
    options: argparse.Namespace,
) -> None:
    """Runs or goes on with a trial, and fills in its state and its metrics."""
    run_id = f"trial_{number:03}"
    words = expand(sweep["command"], sweep["program"], trial["parameters"], options.python)
    environment = os.environ | {
        "WANDB_SWEEP_ID": folder.name,
        "WANDB_RUN_ID": run_id,
        "SWEEPS": str(folder.parent),
    }
    folder.mkdir(parents=True, exist_ok=True)
    words += ["--tracking.wandb_project=null", *options.words]  # there is no server
    with open(folder / f"{run_id}.log", "a") as log:
        process = subprocess.Popen(words, env=environment, stdout=log, stderr=log)
        try:
            status = process.wait()
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise
    if status in STOPPED:  # it goes on when this is run again
        raise KeyboardInterrupt
    trial["state"] = "failed" if status else "finished"
    if status == 0:
        trial["metrics"] = last_metrics(folder / run_id)


def expand(command: list[str], program: str, parameters: dict[str, Any], python: str) -> list[str]:
    """Returns a sweep's `command` with its macros filled in as W&B's agent does."""
    macros = {
        "${env}": ["/usr/bin/env"],
        "${interpreter}": [python],
        "${program}": [program],
        "${args}": [f"--{name}={value}" for name, value in parameters.items()],
    }
    return [word for part in command for word in macros.get(part, [part])]


def last_metrics(run_dir: Path) -> dict[str, float]:
    """Returns the last iteration's metrics by the names that they have in W&B."""
    folders = [path.parent for path in run_dir.glob("iteration_*/manifest.json")]
    last = max(folders, key=lambda path: int(path.name.removeprefix("iteration_")))
    return _flatten(json.loads((last / "metrics.json").read_text()), "iteration")


def read_trials(folder: Path) -> list[dict[str, Any]]:
    """Returns the trials of a sweep that was begun before, none if there was no such."""
    path = folder / "trials.json"
    return json.loads(path.read_text()) if path.exists() else []


def line_of(trial: dict[str, Any], number: int, metric: str) -> str:
    """Returns a trial in a line."""
    shown = ", ".join(f"{name} {_short(value)}" for name, value in trial["parameters"].items())
    value = trial["metrics"].get(metric)
    return f"trial {number}: {shown}: {trial['state'] if value is None else f'{value:.3f}'}"


def table(trials: list[dict[str, Any]], sweep: dict[str, Any]) -> str:
    """Returns all trials, the best by the sweep's metric first, with their held-out rates."""
    metric, names = sweep["metric"]["name"], list(sweep["parameters"])
    sign = -1 if sweep["metric"]["goal"] == "maximize" else 1
    rates = sorted({key for trial in trials for key in trial["metrics"] if _is_rate(key)})
    heads = [key.removeprefix("iteration/evaluation/").removesuffix("/value") for key in rates]
    rows = [[*names, metric.removeprefix("iteration/"), *heads]]
    finished = [trial for trial in trials if metric in trial["metrics"]]
    for trial in sorted(finished, key=lambda trial: sign * trial["metrics"][metric]):
        values = [trial["metrics"].get(key) for key in (metric, *rates)]
        shown = ["-" if value is None else f"{100 * value:.1f} %" for value in values]
        rows.append([*(_short(trial["parameters"][name]) for name in names), *shown])
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _is_rate(key: str) -> bool:
    return key.startswith("iteration/evaluation/") and key.endswith("/greedy_pass@1/value")


def _next_unfinished(trials: list[dict[str, Any]]) -> int | None:
    states = [trial["state"] for trial in trials]
    return states.index("running") if "running" in states else None


def _write_trials(folder: Path, trials: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "trials.json.tmp"
    temporary.write_text(json.dumps(trials, indent=1) + "\n")
    temporary.replace(folder / "trials.json")


def _flatten(value: Any, prefix: str) -> dict[str, float]:
    if isinstance(value, dict):
        flat: dict[str, float] = {}
        for key, item in value.items():
            flat.update(_flatten(item, f"{prefix}/{key}"))
        return flat
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return {prefix: value} if is_number else {}


def _plain(value: Any) -> Any:
    """Returns a value that JSON knows: the engine gives some as numpy's."""
    return value.item() if hasattr(value, "item") else value


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nsweep_local.py: stopped; the same command goes on")
