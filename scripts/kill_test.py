"""Kills a run at random moments, resumes it, and compares it with an uninterrupted one.

    python scripts/kill_test.py --kills 20

Words that this script does not know go to `restem fit`: other settings, other sizes. It exits with
0 only if every killed run ends with the same accepted datasets, policies and metrics (times aside).
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from restem_lightning.run_dir import TEMP_SUFFIX, RunDir, read_json, sha256_of

ROOT = Path(__file__).parent.parent
TINY = {
    "iterations": 2,
    "problems.train.init_args.num": 100,
    "problems.validation.init_args.num": 24,
    "problems.held_out.held_out.init_args.num": 24,
    "sampling.n": 4,
    "selection.max_per_problem": 4,
    "e_step.problems_per_part": 10,
    "evaluation.n": 4,
    "evaluation.ks": "[1,4]",
    "data.batch_size": 8,
    "trainer.max_epochs": 2,
    "trainer.enable_progress_bar": "false",
}
WORKER_MODULE = b"restem_lightning.verifiers.worker"
WORKERS_END_WITHIN_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one killed run.

    Args:
        kills: (seconds after the start, stage) of each kill.
        differences: what is not as in the uninterrupted run; empty if all is.
    """

    kills: list[tuple[float, str]]
    differences: list[str]


def main() -> None:
    """Runs the test and exits with 1 if a killed run differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs in total (default 20)")
    parser.add_argument("--per_run", type=int, default=2, help="SIGKILLs in one run (default 2)")
    parser.add_argument("--jobs", type=int, default=2, help="killed runs at a time (default 2)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    parser.add_argument("--config", default=ROOT / "configs" / "quickstart.yaml", help="run's YAML")
    parser.add_argument(
        "--work_dir", help="kept; a temporary folder, removed at the end, if not given"
    )
    options, words = parser.parse_known_args()
    folder = Path(options.work_dir or tempfile.mkdtemp(prefix="restem-kill-"))
    if folder.exists() and any(folder.iterdir()):
        parser.error(f"--work_dir ({folder}) must be a new or an empty folder")
    settings = [word for key, value in TINY.items() for word in (f"--{key}", str(value))]
    command = [
        *(sys.executable, "-m", "restem_lightning", "fit", "--config", str(options.config)),
        *settings,
        *words,
    ]
    begin_s, end_s = _uninterrupted(command, folder / "whole")
    print(f"uninterrupted: {end_s:.1f} s, of which {begin_s:.1f} s before its folder is there")
    moments = _moments(random.Random(options.seed), options.kills, begin_s, end_s)
    runs = [
        moments[first : first + options.per_run]
        for first in range(0, options.kills, options.per_run)
    ]

    def run(number: int) -> Outcome:
        return _killed(command, folder / f"killed_{number}", runs[number], folder / "whole")

    print(f"\n{'run':>4}{'moment':>9}   {'killed in':32}equal")
    outcomes = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for number, outcome in enumerate(pool.map(run, range(len(runs)))):
            outcomes.append(outcome)
            _show(number, outcome)
    num_equal = sum(not outcome.differences for outcome in outcomes)
    num_kills = sum(len(outcome.kills) for outcome in outcomes)
    print(f"\n{num_equal} of {len(outcomes)} runs equal after {num_kills} kills")
    if not options.work_dir:
        shutil.rmtree(folder)
    sys.exit(num_equal < len(outcomes))


def _show(number: int, outcome: Outcome) -> None:
    """Prints the rows of one run; its last row says whether it is equal."""
    verdict = "NO: " + "; ".join(outcome.differences) if outcome.differences else "yes"
    if not outcome.kills:
        print(f"{number:4}{'-':>9}   {'not killed: it was faster':32}{verdict}", flush=True)
    for place, (moment, stage) in enumerate(outcome.kills, start=1):
        is_last = place == len(outcome.kills)
        print(f"{number:4}{moment:8.1f}s   {stage:32}{verdict if is_last else ''}", flush=True)


def _moments(rng: random.Random, num: int, begin_s: float, end_s: float) -> list[float]:
    """Returns one moment from each of `num` equal slices of the duration, shuffled."""
    width = (end_s - begin_s) / num
    moments = [begin_s + width * (index + rng.random()) for index in range(num)]
    rng.shuffle(moments)
    return moments


def _start(command: list[str], run_dir: Path) -> subprocess.Popen[bytes]:
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    with open(run_dir.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(
            [*command, "--run_dir", str(run_dir)],
            cwd=ROOT,
            env={"OMP_NUM_THREADS": "1", **os.environ},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _uninterrupted(command: list[str], run_dir: Path) -> tuple[float, float]:
    """Returns after how many seconds the run folder was there, and after how many all was done."""
    start, begin_s = time.monotonic(), None
    process = _start(command, run_dir)
    while process.poll() is None:
        if begin_s is None and (run_dir / "run.json").exists():
            begin_s = time.monotonic() - start
        time.sleep(0.02)
    if process.returncode != 0 or begin_s is None:
        sys.exit(f"the uninterrupted run fails: see {run_dir.with_suffix('.log')}")
    return begin_s, time.monotonic() - start


def _killed(command: list[str], run_dir: Path, moments: list[float], whole: Path) -> Outcome:
    """Runs, kills at each moment after a (re)start, resumes to the end, and compares."""
    kills: list[tuple[float, str]] = []
    differences: list[str] = []
    for moment in moments:
        process = _start(command, run_dir)
        try:
            process.wait(moment)
            break
        except subprocess.TimeoutExpired:
            workers = _workers_of(process.pid)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills.append((moment, stage_of(RunDir(run_dir))))
            if alive := _survivors(workers):
                differences.append(f"verifier processes outlive the run: {alive}")
    process = _start(command, run_dir)
    if process.wait() != 0:
        return Outcome(
            kills=kills, differences=[f"resuming fails: see {run_dir.with_suffix('.log')}"]
        )
    return Outcome(kills=kills, differences=[*differences, *_differences(run_dir, whole)])


def stage_of(run: RunDir) -> str:
    """Returns the stage in which a run was when its folder came to look like this."""
    if not run.run_json.exists():
        return "start"
    if not run.iteration(0).metrics.exists():
        return "evaluation of the base"
    iteration = run.resume_iteration()
    paths, before = run.iteration(iteration), run.iteration(iteration - 1)
    if paths.metrics.exists():
        stage = "end"
    elif paths.policy.exists():
        stage = "evaluation"
    elif paths.funnel.exists():
        stage = "M-step" if any(paths.m_step.glob("last-*.ckpt")) else "start of M-step"
    elif paths.completions.exists():
        stage = "E-step"
    elif before.verifier_training.exists() and not before.verifier_json.exists():
        return f"verifier of iteration {iteration - 1}"
    else:
        return f"after iteration {iteration - 1}"
    return f"{stage} of iteration {iteration}"


def _differences(run_dir: Path, whole: Path) -> list[str]:
    """Returns in what a run differs from the uninterrupted one."""
    ours, theirs = _summary(RunDir(run_dir)), _summary(RunDir(whole))
    differing = [key for key in sorted(ours | theirs) if ours.get(key) != theirs.get(key)]
    left = [
        str(path) for path in run_dir.rglob("*") if path.name.endswith((TEMP_SUFFIX, ".partial"))
    ]
    return [f"differs: {key}" for key in differing] + [f"left behind: {path}" for path in left]


def _summary(run: RunDir) -> dict[str, Any]:
    """Returns all that must be equal, by name."""
    summary: dict[str, Any] = {"iterations": run.iterations()}
    for iteration in run.iterations():
        paths = run.iteration(iteration)
        metrics = read_json(paths.metrics)
        for name in ("seconds", "memory_mib"):
            metrics.pop(name, None)
        for name in ("seconds", "tokens_per_s"):
            metrics["e_step"].pop(name, None)
        summary[f"metrics of {iteration}"] = json.dumps(metrics)
        if iteration:
            summary[f"accepted dataset of {iteration}"] = sha256_of(paths.accepted)
            for name, folder in (("policy", paths.policy), ("verifier", paths.verifier)):
                weights = sorted(folder.glob("*.safetensors"))
                summary[f"{name} of {iteration}"] = [sha256_of(path) for path in weights]
    return summary


def _workers_of(pid: int) -> list[int]:
    """Returns the verifier processes that a process has started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            is_worker = WORKER_MODULE in (folder / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == pid and is_worker:
            found.append(int(folder.name))
    return found


def _survivors(pids: list[int]) -> list[int]:
    """Returns those processes that are still there after a few seconds."""
    end = time.monotonic() + WORKERS_END_WITHIN_S
    while (
        alive := [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    ) and time.monotonic() < end:
        time.sleep(0.05)
    return alive


if __name__ == "__main__":
    main()
