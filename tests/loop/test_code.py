"""The loop on programs: the embedded code policy, judged in the sandbox."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from restem_lightning.problems import FunctionProblems
from restem_lightning.run_dir import RunDir, read_json

CONFIG = Path(__file__).parent.parent.parent / "configs" / "quickstart_code.yaml"
TINY = {
    "iterations": 1,
    "problems.train.init_args.num": 24,
    "problems.validation.init_args.num": 8,
    "problems.held_out.held_out.init_args.num": 8,
    "sampling.n": 4,
    "evaluation.n": 0,
    "engine.max_batch_size": 64,
    "engine.cache_tokens": 16384,
    "trainer.max_epochs": 1,
    "trainer.enable_progress_bar": "false",
}


@pytest.fixture(scope="module")
def run(restem, tmp_path_factory):
    folder = tmp_path_factory.mktemp("code") / "run"
    words = [word for key, value in TINY.items() for word in (f"--{key}", value)]
    result = restem("fit", "--config", CONFIG, *words, "--run_dir", folder)
    assert result.code == 0, result.err
    return RunDir(folder)


def test_the_policy_writes_programs_that_the_sandbox_accepts(run):
    counts = read_json(run.iteration(1).metrics)["e_step"]
    assert counts["num_completions"] == 96
    assert counts["num_accepted"] >= 5
    verdicts = counts["verdicts"]
    assert verdicts["CORRECT"] + verdicts["WRONG"] >= 90
    assert verdicts.get("ERROR", 0) == verdicts.get("TIMEOUT", 0) == 0


def test_accepted_programs_are_of_the_length_that_their_problems_ask_for(run):
    num_steps = {
        p.problem_id: p.metadata["num_steps"] for p in FunctionProblems("train", 24).load()
    }
    rows = pq.read_table(run.iteration(1).accepted).to_pylist()
    assert rows
    for row in rows:  # a head, a line for each step, a result: no step can be left out
        assert row["text"].strip().count("\n") - 1 >= num_steps[row["problem_id"]]
