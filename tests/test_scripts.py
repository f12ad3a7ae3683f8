"""The scripts that only a GPU machine runs in full still run here in small."""

import os
import shutil
import subprocess
import sys
import tarfile
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
    "baselines",
    "shapes",
    "fit",
    "sanitizer",
    "growth",
)


def gpu_suite(*words, python=sys.executable):
    return subprocess.run(
        ["bash", "scripts/gpu_suite.sh", *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"PYTHON": python},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_a_dry_run_of_the_gpu_suite_passes_every_stage(tmp_path):
    done = gpu_suite("--dry-run", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    reports = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("== ")]
    assert reports == [f"{stage}:" for stage in STAGES]
    quiet = ("fit", "growth")
    assert all(
        (tmp_path / "out" / f"{stage}.log").read_text() for stage in STAGES if stage not in quiet
    )
    with tarfile.open(tmp_path / "out.tgz") as archive:
        assert {f"./{stage}.log" for stage in STAGES} <= set(archive.getnames())


def test_the_gpu_suite_starts_no_stage_when_its_time_is_over(tmp_path):
    done = gpu_suite("--dry-run", "--out", tmp_path / "out", "--seconds", 0, "engine", "growth")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "not passed: engine growth"
    assert not list((tmp_path / "out").glob("*.log"))


def test_the_gpu_suite_refuses_an_unknown_stage(tmp_path):
    done = gpu_suite("--dry-run", "--out", tmp_path / "out", "kernel")
    assert done.returncode == 2
    assert "no stage kernel" in done.stderr


def test_what_fails_in_a_stage_of_the_gpu_suite_stops_nothing_behind_it(tmp_path):
    words = "--out", tmp_path / "out", "--archive", tmp_path / "all", "shapes", "growth"
    done = gpu_suite(*words, python="false")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "not passed: shapes growth"
    log = (tmp_path / "out" / "shapes.log").read_text().splitlines()
    assert len(log) == len([line for line in log if "failed: false " in line]) == 8
    with tarfile.open(tmp_path / "all") as archive:
        assert "./growth.log" in archive.getnames()


def offline(*words):
    command = [sys.executable, "scripts/offline.py", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_pieces_that_arrive_one_by_one_are_put_together_once_all_are_there(tmp_path):
    policy, pieces, call, to = (tmp_path / name for name in ("policy", "pieces", "call", "to"))
    (policy / "inner").mkdir(parents=True)
    (policy / "inner" / "model.safetensors").write_bytes(os.urandom(5000))
    done = offline("pack", pieces, "--only", "policy", "--policy", policy, "--piece-mib", 0.002)
    assert done.returncode == 0, done.stderr
    files = sorted(pieces.iterdir())
    assert len(files) == 3
    assert max(file.stat().st_size for file in files) <= 0.002 * 2**20
    for file in files[::-1]:
        assert not (to / "policy").exists()
        call.mkdir()
        file.rename(call / file.name)
        done = offline("unpack", call, "--to", to)
        assert done.returncode == 0, done.stderr
        shutil.rmtree(call)
    written, read = (folder / "inner" / "model.safetensors" for folder in (policy, to / "policy"))
    assert read.read_bytes() == written.read_bytes()


def test_a_policy_to_pack_must_be_a_folder(tmp_path):
    done = offline("pack", tmp_path, "--only", "policy", "--policy", tmp_path / "none")
    assert done.returncode == 2
    assert "must be a folder" in done.stderr
