"""The command line inside the test process, and the settings of runs small enough for tests."""

import io
import json
import os
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# Triton's interpreter multiplies by numpy. On processors without AVX-512, OpenBLAS gives a row of a
# product other bits at another place in the matrix, which no GPU does; this kernel of it does not.
os.environ.setdefault("OPENBLAS_CORETYPE", "Sandybridge")

import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # the kernels run without a GPU, slowly

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
# About half of what any policy writes is CORRECT, so no test depends on how good ours is.
EASY = f"{ROOT / 'tests' / 'loop' / 'easy_verifier.py'}:EasyVerifier"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves out what the machine has no device for."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str


def check_line(result: Result, named: list[str], verb: str = "fit") -> None:
    """Asserts that a command ended with one line that names what is wrong."""
    assert result.code == 2
    assert result.err.count("\n") == 1, result.err
    assert result.err.startswith(f"restem {verb}: error: ")
    for name in named:
        assert name in result.err


@pytest.fixture(scope="session")
def restem() -> Callable[..., Result]:
    """Runs the command line in this process."""
    from restem_lightning.cli import main

    torch.set_num_threads(1)

    def run(*words: Any) -> Result:
        out, err, code = io.StringIO(), io.StringIO(), 0
        with redirect_stdout(out), redirect_stderr(err):
            try:
                main([str(word) for word in words])
            except SystemExit as stop:
                code = stop.code or 0
        return Result(code=code, out=out.getvalue(), err=err.getvalue())

    return run


@pytest.fixture(scope="session")
def fit_words() -> Callable[..., list[str]]:
    """Returns the words of `restem fit` for quickstart.yaml made tiny; later settings win."""

    def words(run_dir: Path, **changes: Any) -> list[str]:
        settings = {
            "iterations": 1,
            "policy": "embedded",
            "verifier": EASY,
            "problems.train.init_args.num": 24,
            "problems.validation.init_args.num": 8,
            "problems.held_out.held_out.init_args.num": 8,
            "sampling.n": 4,
            "sampling.temperature": 0.9,
            "sampling.max_new_tokens": 40,
            "selection.max_per_problem": 2,
            "engine.device": "cpu",
            "engine.max_batch_size": 64,
            "engine.cache_tokens": 16384,
            "e_step.problems_per_part": 6,
            "evaluation.n": 2,
            "evaluation.ks": [1, 2],
            "data.batch_size": 8,
            "trainer.accelerator": "cpu",
            "trainer.devices": 1,
            "trainer.max_epochs": 2,
            "trainer.val_check_interval": 0.5,
            "trainer.log_every_n_steps": 1,
            "trainer.enable_progress_bar": False,
            "run_dir": run_dir,
            **changes,
        }
        flat = [(f"--{key}", _word(value)) for key, value in settings.items()]
        return ["fit", "--config", str(QUICKSTART), *(word for pair in flat for word in pair)]

    return words


@pytest.fixture(scope="session")
def outcome() -> Callable[[Any, int], dict]:
    """Returns what a resumed iteration must have in common with an uninterrupted one."""

    from restem_lightning.completion_store import CompletionStore
    from restem_lightning.run_dir import read_json

    def of(run: Any, iteration: int) -> dict:
        paths = run.iteration(iteration)
        metrics = read_json(paths.metrics)
        del metrics["seconds"], metrics["memory_mib"]
        for name in ("seconds", "tokens_per_s"):
            del metrics["e_step"][name]
        columns = ["problem_id", "completion_index", "completion_ids", "logprobs", "verdict"]
        manifest = read_json(paths.manifest)
        return {
            "metrics": metrics,
            "accepted": paths.accepted.read_bytes(),
            "pool": CompletionStore(paths.completions).read(columns).to_pylist(),
            "policy_hash": manifest["policy_hash"],
        }

    return of


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str).strip('"')
