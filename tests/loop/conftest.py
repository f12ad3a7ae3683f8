"""Finished runs that several tests look at."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from restem_lightning.run_dir import RunDir


@pytest.fixture(scope="session")
def callbacks(tmp_path_factory) -> str:
    """The value of `trainer.callbacks` that makes snapshots; the same in all runs compared."""
    folder = tmp_path_factory.mktemp("snapshots")
    class_path = "tests.loop.snapshots.Snapshots"
    return json.dumps([{"class_path": class_path, "init_args": {"folder": str(folder)}}])


@pytest.fixture(scope="session")
def snapshots(callbacks, finished) -> Path:
    """Folder of the snapshots of the run `finished`, named iteration_<t>_<moment>."""
    return Path(json.loads(callbacks)[0]["init_args"]["folder"])


@pytest.fixture(scope="session")
def finished(restem, fit_words, callbacks, tmp_path_factory) -> RunDir:
    """A run of two iterations, never interrupted. Not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    result = restem(*fit_words(folder, iterations=2, **{"trainer.callbacks": callbacks}))
    assert result.code == 0, result.err
    return RunDir(folder)


@pytest.fixture(scope="session")
def tracked(restem, fit_words, tmp_path_factory) -> RunDir:
    """A run of one iteration, gone on with to a second, with W&B offline. Not to be changed."""
    run = RunDir(tmp_path_factory.mktemp("tracked") / "run")
    changes = {"tracking.wandb_project": "tests", "tracking.wandb_mode": "offline"}
    for iterations in (1, 2):
        result = restem(*fit_words(run.path, iterations=iterations, **changes))
        assert result.code == 0, result.err
    return run


@pytest.fixture
def copy_of(tmp_path) -> Callable[[Path], RunDir]:
    """Returns a copy of a run folder that a test may change."""

    def copy(source: Path) -> RunDir:
        shutil.copytree(source, tmp_path / "copy")
        return RunDir(tmp_path / "copy")

    return copy
