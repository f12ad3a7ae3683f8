"""A rank killed in the E-step and in the M-step: one line of ours, and the same command goes on."""

import json
import os
import platform
import signal
import subprocess
import time
from pathlib import Path

from restem_lightning.run_dir import RunDir, read_json
from tests.faults.conftest import SETTINGS
from tests.launch import torchrun

ROOT = Path(__file__).parents[2]
FSDP = {
    "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
    "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1},
}
TWO_RANKS = {"trainer.strategy": json.dumps(FSDP), "trainer.devices": 2}


def launch(words, program=("-m", "restem_lightning")):
    return subprocess.Popen(
        **torchrun(2, *program, *words), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def launch_changed(words, folder, *lines):
    """Starts two ranks whose program has lines of its own before it runs the command."""
    program = folder / "program.py"
    imports = "import os, signal, sys", "from restem_lightning.cli import main"
    program.write_text("\n".join([*imports, *lines, "main(sys.argv[1:])", ""]))
    return launch(words, (str(program),))


def kill_last_rank(launched):
    """Ends the last process that torchrun has started; verifier workers are ranks' children."""
    children = Path(f"/proc/{launched.pid}/task/{launched.pid}/children").read_text().split()
    ranks = [c for c in children if b"fit" in Path(f"/proc/{c}/cmdline").read_bytes().split(b"\0")]
    assert len(ranks) == 2
    os.kill(int(ranks[-1]), signal.SIGKILL)


def test_rank_zero_lost_while_the_report_is_written_is_said_by_another(begun, fit_words, tmp_path):
    run = begun(tmp_path, "m_step")
    launched = launch_changed(
        fit_words(run.path, **SETTINGS, **TWO_RANKS),
        tmp_path,
        "from restem_lightning.fit import run",
        "run.write_report = lambda *_: os.kill(os.getpid(), signal.SIGKILL)",
    )
    err = launched.communicate(timeout=120)[1]
    assert launched.returncode != 0
    (line,) = [line for line in err.splitlines() if line.startswith("restem fit: rank")]
    assert f"rank 0 (node {platform.node()}) was lost; {run.path} keeps 1 finished" in line


def test_a_rank_killed_behind_its_vote_to_stop_is_said_too(fit_words, tmp_path):
    run = RunDir(tmp_path / "run")
    launched = launch_changed(
        fit_words(run.path, **SETTINGS, **TWO_RANKS),
        tmp_path,
        "from restem_lightning.fit import run",
        "if os.environ['RANK'] == '1':",
        "    run.StopRequest.is_leaving = lambda _: False  # it is killed, not told to leave",
        "    run.leave_together = lambda *_: os.kill(os.getpid(), signal.SIGKILL)",
    )
    end = time.monotonic() + 120
    while not any(run.iteration(1).completions.glob("part-*.json")) and time.monotonic() < end:
        time.sleep(0.01)
    launched.terminate()
    err = launched.communicate(timeout=120)[1]
    (line,) = [line for line in err.splitlines() if line.startswith("restem fit: ")]
    assert f"rank 1 (node {platform.node()}) was lost; {run.path} keeps 0 finished" in line
    assert "go on with: restem fit" in line


def test_disks_that_ranks_do_not_share_are_refused_before_anything_is_drawn(fit_words, tmp_path):
    launched = launch_changed(
        fit_words(Path("run"), **SETTINGS, **TWO_RANKS),
        tmp_path,
        "from restem_lightning.loop import ranks",
        "ranks.SEEN_WITHIN_S = 1.0",
        f"folder = '{tmp_path}/' + os.environ['RANK']",
        "os.mkdir(folder)",
        "os.chdir(folder)",
    )
    err = launched.communicate(timeout=120)[1]
    assert launched.returncode != 0
    (line,) = [line for line in err.splitlines() if line.startswith("restem fit: error")]
    assert "run/run.json was written by another rank" in line
    assert "a disk that all nodes share" in line
    assert not list(tmp_path.rglob("part-*.json"))


def test_a_killed_rank_is_said_in_one_line_and_the_same_command_goes_on(whole, fit_words, tmp_path):
    run = RunDir(tmp_path / "run")
    words = fit_words(run.path, **SETTINGS, **TWO_RANKS)
    paths = run.iteration(1)
    moments = [
        (paths.completions, "part-*.json", "E-step of iteration 1"),
        (paths.m_step, "last-*.ckpt/meta.pt", "M-step of iteration 1 up to last-2.ckpt"),
    ]
    for folder, written, kept in moments:
        launched, end = launch(words), time.monotonic() + 120
        while not any(folder.glob(written)) and launched.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        kill_last_rank(launched)
        err = launched.communicate(timeout=120)[1]
        assert launched.returncode != 0
        # What torchrun itself says of it comes besides.
        (line,) = [line for line in err.splitlines() if line.startswith("restem fit: ")]
        assert f"rank 1 (node {platform.node()}) was lost" in line
        assert kept in line
        assert "go on with: restem fit" in line
        assert "[rank0]" not in err  # torch's mark of a stack trace
        assert not paths.manifest.exists()
    resumed = launch(words)
    err = resumed.communicate(timeout=120)[1]
    assert resumed.returncode == 0, err[-3000:]
    assert paths.accepted.read_bytes() == whole.iteration(1).accepted.read_bytes()
    m_steps = [read_json(each.metrics)["m_step"] for each in (paths, whole.iteration(1))]
    assert m_steps[0] == m_steps[1]
