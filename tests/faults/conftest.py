"""A run that nothing disturbs, folders to begin again from, and a disk that fails when told to."""

import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from restem_lightning.run_dir import RunDir

DISK_BYTES = 64 << 20
# Two looks at D_val, each with its checkpoints.
SETTINGS = {
    "trainer.max_epochs": 1,
    "trainer.val_check_interval": 2,
    "stop.rule": "best",
    "evaluation.n": 0,
}


@pytest.fixture(scope="session")
def whole(restem, fit_words, tmp_path_factory) -> RunDir:
    """A run of one iteration that nothing disturbed. Not to be changed."""
    run = RunDir(tmp_path_factory.mktemp("whole") / "run")
    result = restem(*fit_words(run.path, **SETTINGS))
    assert result.code == 0, result.err
    return run


@pytest.fixture
def disk(tmp_path) -> Iterator["Disk"]:
    """A file system of its own as root; else a folder, whose faults are imitated by limits."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        yield Disk(folder, is_mounted=False)
        return
    _run("mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", folder)
    try:
        yield Disk(folder, is_mounted=True)
    finally:
        _run("umount", "--lazy", folder)


@pytest.fixture
def begun(whole) -> Callable[[Path, str], RunDir]:
    """Returns a copy of the whole run as if it had come up to a stage."""

    def copy(folder: Path, stage: str) -> RunDir:
        run = RunDir(folder / "run")
        shutil.copytree(whole.path, run.path)
        paths = run.iteration(1)
        kept = {"parts": 2, "accepted": 4, "m_step": 4, "evaluation": 4}[stage]
        for part in sorted(paths.completions.glob("part-*"))[2 * kept :]:
            part.unlink()
        gone = [paths.manifest, paths.metrics, paths.policy, paths.m_step]
        gone.append(paths.path / "evaluation")
        if stage in ("parts", "accepted"):
            gone += [paths.funnel, paths.accepted, paths.path / "parity.json"]
        for path in gone:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return run

    return copy


class Disk:
    """A place to write to that can be full or read-only for a while."""

    def __init__(self, folder: Path, *, is_mounted: bool) -> None:
        self.folder, self.is_mounted = folder, is_mounted

    def be_full(self, free_bytes: int) -> None:
        """Leaves so much space; without a file system of its own, to each file."""
        if not self.is_mounted:
            _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (free_bytes, most))
            return
        filler = self.folder / "filler"
        with filler.open("wb", buffering=0) as file:
            state = os.statvfs(self.folder)
            os.posix_fallocate(file.fileno(), 0, state.f_bavail * state.f_frsize - free_bytes)

    def be_read_only(self, _: int) -> None:
        """Lets nothing be written."""
        if self.is_mounted:
            _run("mount", "-o", "remount,ro", self.folder)
            return
        for folder in (path for path in self.folder.rglob("*") if path.is_dir()):
            folder.chmod(0o555)

    def mend(self) -> None:
        """Takes the fault away."""
        if self.is_mounted:
            _run("mount", "-o", "remount,rw", self.folder)
            (self.folder / "filler").unlink(missing_ok=True)
            return
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        for folder in (path for path in self.folder.rglob("*") if path.is_dir()):
            folder.chmod(0o755)


def do_before(
    monkeypatch: pytest.MonkeyPatch, place: Any, name: str, call: int, do: Callable[[], None]
) -> None:
    """Does something when a function is called for the `call`th time, then calls it."""
    function, calls = getattr(place, name), []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == call:
            do()
        return function(*args, **kwargs)

    monkeypatch.setattr(place, name, wrapped)


def _run(*words: object) -> None:
    subprocess.run([str(word) for word in words], check=True, capture_output=True)
