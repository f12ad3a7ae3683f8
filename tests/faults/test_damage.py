"""Damaged files, a server that is away, a verifier worker that dies; README.md is the table."""

import json
import resource
import shutil
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from restem_lightning.loop import callback
from restem_lightning.loop.journal import Journal
from restem_lightning.m_step.checkpoint_io import AtomicCheckpointIO
from restem_lightning.m_step.checkpoints import is_whole, write_error
from restem_lightning.run_dir import RunDir, read_json
from tests.faults.conftest import SETTINGS, do_before

ROOT = Path(__file__).parents[2]
DYING = "tests.faults.dying_verifier.DyingVerifier"


class Killed(BaseException):
    """Ends a run where it stands."""


@pytest.fixture
def before_export(begun, restem, fit_words, monkeypatch, tmp_path):
    """A run killed behind its last optimizer step, with all checkpoints of its M-step."""
    run = begun(tmp_path, "m_step")

    def kill():
        raise Killed

    with monkeypatch.context() as patch:
        do_before(patch, callback, "export_policy", 1, kill)
        with pytest.raises(Killed):
            restem(*fit_words(run.path, **SETTINGS))
    assert not run.iteration(1).policy.exists()
    return run


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_flipped_bit_in_a_part_is_named_and_the_part_is_drawn_again(
    begun, whole, restem, fit_words, outcome, tmp_path
):
    run = begun(tmp_path, "accepted")
    words = fit_words(run.path, **SETTINGS)
    part = run.iteration(1).completions / "part-00002.parquet"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    stopped = restem(*words)
    assert stopped.code == 2
    (line,) = stopped.err.splitlines()
    assert f"{part} is missing or damaged" in line
    assert "run again" in line
    part.unlink()
    part.with_suffix(".json").unlink()
    resumed = restem(*words)
    assert resumed.code == 0, resumed.err
    assert outcome(run, 1) == outcome(whole, 1)


def test_a_truncated_accepted_dataset_is_named_and_selected_anew(
    begun, whole, restem, fit_words, outcome, tmp_path
):
    run = begun(tmp_path, "m_step")
    words, accepted = fit_words(run.path, **SETTINGS), run.iteration(1).accepted
    truncate(accepted)
    stopped = restem(*words)
    assert stopped.code == 2
    (line,) = stopped.err.splitlines()
    assert f"{accepted}) is damaged" in line
    assert "delete it and give the same command again" in line
    accepted.unlink()
    resumed = restem(*words)
    assert resumed.code == 0, resumed.err
    assert outcome(run, 1) == outcome(whole, 1)


def test_a_truncated_checkpoint_is_passed_over(before_export, whole, restem, fit_words, outcome):
    (last,) = before_export.iteration(1).m_step.glob("last-*.ckpt")
    truncate(last)
    resumed = restem(*fit_words(before_export.path, **SETTINGS))
    assert resumed.code == 0, resumed.err
    assert outcome(before_export, 1) == outcome(whole, 1)


def test_a_truncated_best_checkpoint_is_named_and_the_m_step_begins_anew(
    before_export, whole, restem, fit_words, outcome
):
    folder = before_export.iteration(1).m_step
    (best,) = folder.glob("best-*.ckpt")
    truncate(best)
    words = fit_words(before_export.path, **SETTINGS)
    stopped = restem(*words)
    assert stopped.code == 2
    (line,) = stopped.err.splitlines()
    assert f"{best}) is damaged; delete {folder} " in line
    shutil.rmtree(folder)
    resumed = restem(*words)
    assert resumed.code == 0, resumed.err
    assert outcome(before_export, 1) == outcome(whole, 1)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "meta.pt"])
def test_a_sharded_checkpoint_is_whole_until_a_file_of_it_is_truncated_or_gone(name, tmp_path):
    dcp.save({"weights": torch.ones(99)}, checkpoint_id=tmp_path, no_dist=True)
    torch.save({"epoch": 1}, tmp_path / "meta.pt")
    assert is_whole(tmp_path)
    truncate(tmp_path / name)
    assert not is_whole(tmp_path)


@contextmanager
def full_disk(most=1 << 19):
    """No file may grow beyond so many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_checkpoint_that_does_not_fit_names_its_file_and_leaves_nothing(tmp_path):
    path = tmp_path / "last-2.ckpt"
    with full_disk(), pytest.raises(OSError, match="File too large") as raised:
        AtomicCheckpointIO().save_checkpoint({"weights": torch.ones(1 << 18)}, str(path))
    assert raised.value.filename == str(path)
    assert not list(tmp_path.iterdir())


def test_what_torch_raises_on_a_full_disk_is_known_as_a_failed_write(tmp_path):
    weights = {"weights": torch.ones(1 << 18)}
    writers = (
        lambda: dcp.save(weights, checkpoint_id=tmp_path / "folder", no_dist=True),
        lambda: torch.save(weights, tmp_path / "file"),
    )
    for write in writers:
        with full_disk(), pytest.raises((RuntimeError, CheckpointException)) as raised:
            write()
        assert write_error(raised.value)
    assert write_error(RuntimeError("anything else")) is None


def test_a_journal_with_a_torn_line_keeps_the_others_where_nothing_can_be_written(tmp_path):
    path = tmp_path / "tracking.jsonl"
    Journal(path).append("base/0", {})
    with path.open("a") as file:
        file.write('{"step": 1, "ti')
    with full_disk(most=0):
        Journal(path)
    assert [entry.key for entry in Journal(path).entries] == ["base/0"]


def test_w_and_b_out_of_reach_is_said_and_the_run_goes_on(
    begun, whole, restem, fit_words, outcome, monkeypatch, tmp_path
):
    run = begun(tmp_path, "m_step")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    changes = {"tracking.wandb_project": "t", "tracking.wandb_timeout_s": 1.0}
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        result = restem(*fit_words(run.path, **SETTINGS, **changes))
    assert result.code == 0, result.err
    lines = [line for line in result.err.splitlines() if "W&B does not take this run" in line]
    assert len(lines) == 1
    assert "goes on offline" in lines[0]
    assert outcome(run, 1) == outcome(whole, 1)


def test_w_and_bs_process_ended_by_the_sigterm_of_a_whole_job_is_said_without_a_stack_trace(
    tmp_path,
):
    program = tmp_path / "program.py"
    program.write_text(
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from restem_lightning.loop.tracking import Tracker, TrackingParams\n"
        "from restem_lightning.run_dir import open_run\n"
        "from restem_lightning.settings import EMBEDDED_POLICY\n"
        "params = TrackingParams(wandb_project='t', wandb_mode='offline')\n"
        "run = open_run(sys.argv[1], {'seed': 0})\n"
        "with Tracker(params, run, {}, base=str(EMBEDDED_POLICY)):\n"
        "    children = Path(f'/proc/{os.getpid()}/task/{os.getpid()}/children')\n"
        "    (core,) = children.read_text().split()\n"
        "    os.kill(int(core), signal.SIGTERM)\n"
        "    os.waitid(os.P_PID, int(core), os.WEXITED | os.WNOWAIT)\n"
    )
    words = [sys.executable, program, tmp_path / "run"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0
    assert "W&B: closing the run failed" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_verifier_worker_that_dies_costs_one_verdict(restem, fit_words, tmp_path):
    verifier = {"class_path": DYING, "init_args": {"died": str(tmp_path / "died")}}
    run = RunDir(tmp_path / "run")
    result = restem(*fit_words(run.path, **SETTINGS, verifier=json.dumps(verifier)))
    assert result.code == 0, result.err
    assert (tmp_path / "died").exists()
    e_step = read_json(run.iteration(1).metrics)["e_step"]
    assert e_step["verdicts"]["ERROR"] == 1
    assert e_step["num_completions"] == 96
    assert run.iteration(1).manifest.exists()
