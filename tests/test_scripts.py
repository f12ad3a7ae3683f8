"""The scripts that only a GPU machine runs in full still run here in small."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = (
    "environment",
    "kernels",
    "engine",
    "sampler",
    "bench_kernels",
    "m_step",
    "shapes",
    "sanitizer",
    "fit",
    "growth",
)


def gpu_suite(*words):
    return subprocess.run(
        ["bash", "scripts/gpu_suite.sh", *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_a_dry_run_of_the_gpu_suite_passes_every_stage(tmp_path):
    done = gpu_suite("--dry-run", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    reports = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("== ")]
    assert reports == [f"{stage}:" for stage in STAGES]
    assert all((tmp_path / "out" / f"{stage}.log").read_text() for stage in STAGES[:-2])


def test_the_gpu_suite_starts_no_stage_when_its_time_is_over(tmp_path):
    done = gpu_suite("--dry-run", "--out", tmp_path / "out", "--seconds", 0, "engine", "growth")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "not passed: engine growth"
    assert not list((tmp_path / "out").glob("*.log"))


def test_the_gpu_suite_refuses_an_unknown_stage(tmp_path):
    done = gpu_suite("--dry-run", "--out", tmp_path / "out", "kernel")
    assert done.returncode == 2
    assert "no stage kernel" in done.stderr
