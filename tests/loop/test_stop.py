"""Ctrl-C and SIGTERM: one line, what is saved, the command that goes on; and it does go on."""

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
        (in_e_step, signal.SIGTERM, 143, "E-step of iteration 1"),
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
    assert lines[0].startswith("restem fit: stopped; ")
    assert kept in lines[0]
    command = lines[0].partition("go on with: ")[2]
    assert shlex.split(command) == ["restem", *words]
    assert not run.iteration(1).manifest.exists()
    resumed = restem(*shlex.split(command)[1:])
    assert resumed.code == 0, resumed.err
    assert run.iteration(1).manifest.exists()
