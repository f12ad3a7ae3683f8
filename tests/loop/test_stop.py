"""A signal: one line, what is saved, the command that goes on; and it does go on."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from restem_lightning.run_dir import RunDir

ROOT = Path(__file__).parents[2]
# Six optimizer steps, a look at D_val after every third.
LONG_M_STEP = {"data.batch_size": 8, "trainer.val_check_interval": 3, "stop.rule": "best"}


@pytest.fixture(scope="module")
def whole(restem, fit_words, tmp_path_factory):
    """A run that nothing stops."""
    run = RunDir(tmp_path_factory.mktemp("whole") / "run")
    result = restem(*fit_words(run.path, **LONG_M_STEP))
    assert result.code == 0, result.err
    return run


def in_e_step(run):
    """The E-step of iteration 1 has written a part and is not at its end."""
    return any((run.path / "iteration_1" / "completions").glob("part-*.json"))


def in_m_step(run):
    """The M-step of iteration 1 has written a checkpoint to resume from."""
    return any((run.path / "iteration_1" / "m_step").glob("last-*.ckpt"))


@pytest.mark.parametrize(
    ("moment", "signum", "code", "kept"),
    [
        (in_e_step, signal.SIGINT, 130, "E-step of iteration 1"),
        (in_m_step, signal.SIGINT, 130, "M-step of iteration 1"),
        (in_e_step, signal.SIGTERM, 75, "E-step of iteration 1"),
    ],
)
def test_a_stopped_run_says_what_is_saved_and_how_to_go_on(
    moment, signum, code, kept, restem, fit_words, tmp_path
):
    run = RunDir(tmp_path / "run")
    changes = {
        "problems.train.init_args.num": 32,
        "e_step.problems_per_part": 2,
        "engine.max_batch_size": 32,
        "data.batch_size": 4,
        "trainer.val_check_interval": 0.25,
        "stop.rule": "best",
        "evaluation.n": 0,
    }
    words = fit_words(run.path, **changes)
    process = subprocess.Popen(
        [sys.executable, "-m", "restem_lightning", *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 120
    while not moment(run) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    assert process.poll() is None
    process.send_signal(signum)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == code, err
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    assert lines[0].startswith(f"restem fit: stopped by {signal.Signals(signum).name}; ")
    assert kept in lines[0]
    command = lines[0].partition("go on with: ")[2]
    assert shlex.split(command) == ["restem", *words]
    assert not run.iteration(1).manifest.exists()
    resumed = restem(*shlex.split(command)[1:])
    assert resumed.code == 0, resumed.err
    assert run.iteration(1).manifest.exists()


@pytest.mark.parametrize(
    ("moment", "optimizer_step", "kept"),
    [
        ("on_train_batch_start", 1, "last-2.ckpt"),  # in the middle of an epoch: saved there
        ("on_train_batch_end", 3, "last-4.ckpt"),  # a look at D_val is due: after the next step
        ("on_validation_start", None, "last-4.ckpt"),
        ("on_train_end", None, "the policy of iteration 1"),  # in the export
        ("on_fit_end", None, "the policy of iteration 1"),  # in the evaluation
    ],
)
def test_a_signal_anywhere_in_the_m_step_changes_nothing(
    moment, optimizer_step, kept, restem, fit_words, outcome, whole, tmp_path
):
    run = RunDir(tmp_path / "run")
    signaller = {"class_path": "tests.loop.signaller.Signaller"}
    signaller["init_args"] = {"sent": str(tmp_path / "sent"), "moment": moment}
    signaller["init_args"]["optimizer_step"] = optimizer_step
    words = fit_words(run.path, **LONG_M_STEP, **{"trainer.callbacks": json.dumps([signaller])})
    stopped = restem(*words)
    assert stopped.code == 75, stopped.err
    assert kept in stopped.err
    assert not run.iteration(1).manifest.exists()
    resumed = restem(*words)
    assert resumed.code == 0, resumed.err
    assert outcome(run, 1) == outcome(whole, 1)


def test_the_run_stops_before_the_allocation_ends(restem, fit_words, monkeypatch, tmp_path):
    words = fit_words(tmp_path / "run", walltime_reserve_s=100)
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 102))
    stopped = restem(*words)
    assert stopped.code == 75, stopped.err
    assert "stopped by the end of the allocation" in stopped.err


def test_a_reserve_that_leaves_nothing_of_the_allocation_is_refused(
    restem, fit_words, monkeypatch, tmp_path
):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 60))
    refused = restem(*fit_words(tmp_path / "run"))
    assert refused.code == 2
    assert "walltime_reserve_s (120)" in refused.err
