"""A finished run of two iterations: what lies in its folder and whether it is true."""

import contextlib
import csv
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from restem_lightning.completion_store import CompletionStore
from restem_lightning.m_step.export import policy_hash
from restem_lightning.m_step.packing import epoch_order
from restem_lightning.run_dir import TEMP_SUFFIX, RunDir, read_json
from restem_lightning.settings import EMBEDDED_POLICY
from restem_lightning.verifiers.base import load_object

EASY = Path(__file__).with_name("easy_verifier.py")


@pytest.fixture(scope="module")
def quiet(restem, fit_words, tmp_path_factory):
    """A run with another seed than `finished`, and what it printed."""
    run = RunDir(tmp_path_factory.mktemp("quiet") / "run")
    changes = {"seed_everything": 1, "trainer.max_epochs": 1}
    return run, restem(*fit_words(run.path, **changes))


def policy_that_sampled(run, iteration):
    return EMBEDDED_POLICY if iteration == 1 else run.iteration(iteration - 1).policy


@torch.no_grad()
def logits_of(folder, prompt_ids, completion_ids):
    """Logits that predict the completion, by Hugging Face's own forward."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([[*prompt_ids, *completion_ids]])
    return model(input_ids=ids).logits[0, len(prompt_ids) - 1 : -1]


def logprobs_of(logits, completion_ids):
    return logits.log_softmax(-1).gather(1, torch.tensor(completion_ids)[:, None])[:, 0]


def first_train_loss(run, iteration):
    """The loss that the M-step logged before its first update."""
    (log,) = (run.iteration(iteration).m_step / "log").glob("*/metrics.csv")
    with open(log) as file:
        return next(float(row["train_loss"]) for row in csv.DictReader(file) if row["train_loss"])


def expected_first_loss(run, iteration, folder, batch_size=8):
    """The mean negative log-likelihood of the first batch under the weights of a policy folder."""
    rows = pq.read_table(run.iteration(iteration).accepted).to_pylist()
    nll = []
    for index in epoch_order(len(rows), 0, 0)[:batch_size]:
        prompt_ids, ids = rows[index]["prompt_ids"], rows[index]["completion_ids"]
        nll += (-logprobs_of(logits_of(folder, prompt_ids, ids), ids)).tolist()
    return sum(nll) / len(nll)


def test_the_folder_holds_what_the_documents_promise(finished):
    for iteration in (1, 2):
        paths = finished.iteration(iteration)
        files = [paths.accepted, paths.funnel, paths.metrics, paths.manifest]
        files += [paths.completions / f"part-0000{index}.parquet" for index in range(4)]
        files += [paths.policy / name for name in ("model.safetensors", "tokenizer.json")]
        for file in (*files, finished.run_json, finished.report):
            assert file.is_file(), file
        assert paths.m_step.is_dir()
    assert finished.iteration(0).metrics.is_file()
    assert finished.finished_iterations() == [1, 2]


def test_nothing_half_written_and_no_checkpoint_stays(finished):
    names = [path.name for path in finished.path.rglob("*")]
    assert not [name for name in names if name.endswith((TEMP_SUFFIX, ".partial", ".ckpt"))]


def test_no_token_file_of_the_m_step_stays(finished):
    assert not [path for path in finished.path.rglob("accepted.*") if path.suffix != ".parquet"]


def test_run_json_says_what_ran(finished):
    run = read_json(finished.run_json)
    assert run["seed"] == 0
    assert run["settings"]["sampling"]["n"] == 4
    # A wheel of the package index does not name its CUDA, `2.11.0` for `2.11.0+cu130`.
    assert torch.__version__.startswith(run["versions"]["torch"])


@pytest.mark.parametrize("iteration", [0, 1, 2])
def test_metrics_have_the_documented_shape(finished, iteration):
    metrics = read_json(finished.iteration(iteration).metrics)
    assert metrics["iteration"] == iteration
    measured = metrics["evaluation"]["held_out"]
    assert set(measured) == {"greedy_pass@1", "pass@1", "pass@2", "maj@2"}
    for value in measured.values():
        assert 0 <= value["low"] <= value["value"] <= value["high"] <= 1
        assert value["num_problems"] == 8
    assert metrics["seconds"]["evaluation"] > 0
    if iteration == 0:
        assert metrics["e_step"] == metrics["m_step"] == {}


@pytest.mark.parametrize("iteration", [1, 2])
def test_numbers_of_the_e_step_are_those_of_its_pool(finished, iteration):
    paths = finished.iteration(iteration)
    e_step = read_json(paths.metrics)["e_step"]
    rows = CompletionStore(paths.completions).read().to_pylist()
    assert e_step["num_problems"] == len({row["problem_id"] for row in rows}) == 24
    assert e_step["num_completions"] == len(rows) == 96
    assert e_step["num_tokens"] == sum(len(row["completion_ids"]) for row in rows)
    assert e_step["num_accepted"] == pq.read_metadata(paths.accepted).num_rows
    assert e_step["acceptance_rate"] == e_step["num_accepted"] / 96
    for verdict, count in e_step["verdicts"].items():
        assert count == sum(row["verdict"] == verdict for row in rows)
    assert e_step["tokens_per_s"] == pytest.approx(e_step["num_tokens"] / e_step["seconds"], 0.01)


@pytest.mark.parametrize("iteration", [1, 2])
def test_numbers_of_the_m_step_agree_with_each_other(finished, iteration):
    m_step = read_json(finished.iteration(iteration).metrics)["m_step"]
    assert m_step["optimizer_steps"] > 0
    rewards = dict(m_step["val_rewards"])
    assert 0 < max(rewards) <= m_step["optimizer_steps"]
    assert rewards[m_step["best_optimizer_step"]] == m_step["best_val_reward"]
    assert m_step["best_val_reward"] == max(rewards.values())


@pytest.mark.parametrize("iteration", [1, 2])
def test_each_iteration_is_sampled_by_the_policy_before_it(finished, iteration):
    hashes = CompletionStore(finished.iteration(iteration).completions).read(["policy_hash"])
    assert set(hashes["policy_hash"].to_pylist()) == {
        policy_hash(policy_that_sampled(finished, iteration))
    }


@pytest.mark.parametrize("iteration", [1, 2])
def test_text_and_verdict_of_each_completion_are_those_of_its_ids(finished, iteration):
    tokenizer = AutoTokenizer.from_pretrained(policy_that_sampled(finished, iteration))
    verifier = load_object(f"{EASY}:EasyVerifier")()
    for row in CompletionStore(finished.iteration(iteration).completions).read().to_pylist():
        assert tokenizer.decode(row["completion_ids"], skip_special_tokens=True) == row["text"]
        verdict = verifier.verify(None, row["text"])
        assert (verdict.kind.value, verdict.reward) == (row["verdict"], row["reward"])
        assert verdict.extracted == row["extracted"]
        ended = row["completion_ids"][-1] == tokenizer.eos_token_id
        assert row["finish_reason"] == ("eos" if ended else "length")
        assert len(row["completion_ids"]) == 40 or ended


@pytest.mark.parametrize("iteration", [1, 2])
def test_log_probabilities_are_those_of_a_plain_forward(finished, iteration):
    pool = CompletionStore(finished.iteration(iteration).completions).read().to_pylist()
    folder = policy_that_sampled(finished, iteration)
    for row in pool[::9]:
        ids, sampling = row["completion_ids"], json.loads(row["sampling"])
        assert len(row["logprobs"]) == len(row["sampling_logprobs"]) == len(ids)
        logits = logits_of(folder, row["prompt_ids"], ids)
        expected = logprobs_of(logits, ids)
        torch.testing.assert_close(torch.tensor(row["logprobs"]), expected, atol=1e-4, rtol=0)
        scaled = logits / sampling["temperature"]
        least = scaled.topk(min(sampling["top_k"], scaled.shape[1])).values[:, -1:]
        drawn_from = scaled.masked_fill(scaled < least, float("-inf"))
        torch.testing.assert_close(
            torch.tensor(row["sampling_logprobs"]), logprobs_of(drawn_from, ids), atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("iteration", [1, 2])
def test_only_correct_whole_completions_are_accepted_and_no_more_than_allowed(finished, iteration):
    paths = finished.iteration(iteration)
    pool = {
        (row["problem_id"], row["completion_index"]): row
        for row in CompletionStore(paths.completions).read().to_pylist()
    }
    eligible = {
        key for key, row in pool.items()
        if row["verdict"] == "CORRECT" and row["finish_reason"] != "length"
    }  # fmt: skip
    accepted = pq.read_table(paths.accepted).to_pylist()
    keys = [(row["problem_id"], row["completion_index"]) for row in accepted]
    assert len(set(keys)) == len(keys)
    for problem_id in {key[0] for key in pool}:
        first = sorted(key for key in eligible if key[0] == problem_id)[:2]
        assert sorted(key for key in keys if key[0] == problem_id) == first
    for row in accepted:
        source = pool[row["problem_id"], row["completion_index"]]
        for name in ("prompt_ids", "completion_ids", "text", "logprobs"):
            assert row[name] == source[name]


def test_the_second_m_step_starts_from_the_base_model(finished):
    assert read_json(finished.iteration(2).manifest)["trained_from"] == str(EMBEDDED_POLICY)
    base = expected_first_loss(finished, 2, EMBEDDED_POLICY)
    previous = expected_first_loss(finished, 2, finished.iteration(1).policy)
    assert abs(base - previous) > 0.01
    assert first_train_loss(finished, 2) == pytest.approx(base, abs=1e-5)


def test_start_from_previous_trains_the_policy_before(restem, fit_words, tmp_path):
    run = RunDir(tmp_path / "run")
    result = restem(*fit_words(run.path, iterations=2, start_from="previous"))
    assert result.code == 0, result.err
    first = run.iteration(1).policy
    assert read_json(run.iteration(2).manifest)["trained_from"] == str(first)
    expected = expected_first_loss(run, 2, first)
    assert first_train_loss(run, 2) == pytest.approx(expected, abs=1e-5)


def test_another_seed_draws_other_completions(finished, quiet):
    run, _ = quiet
    pools = [
        CompletionStore(one.iteration(1).completions).read(["completion_ids"]).to_pylist()
        for one in (run, finished)
    ]
    assert len(pools[0]) == len(pools[1])
    assert pools[0] != pools[1]


def test_the_screen_shows_funnel_results_table_and_paths(restem, fit_words, finished):
    words = fit_words(finished.path, iterations=2)
    callbacks = read_json(finished.run_json)["settings"]["trainer"]["callbacks"]
    result = restem(*words, "--trainer.callbacks", json.dumps(callbacks))
    assert result.code == 0
    assert result.err == ""
    assert re.search(r"iteration +greedy pass@1", result.out)
    assert str(finished.report) in result.out
    assert str(finished.iteration(2).policy) in result.out


def test_no_library_chatter_reaches_the_screen(quiet):
    _, result = quiet
    assert result.err == ""
    lines = [line for line in result.out.splitlines() if line.strip()]
    assert lines[0].startswith(
        "1 iterations, 24 problems x 4 completions each; 8 problems in D_val"
    )
    assert lines[1].startswith("iteration 0: held_out greedy_pass@1 ")
    assert re.match(r"iteration 1: completions 96 -> not truncated \d+ -> correct \d+", lines[2])
    assert lines[3].startswith("iteration 1: held_out greedy_pass@1 ")
    assert lines[4].split()[:2] == ["iteration", "greedy"]
    assert [line.split()[0] for line in lines[5:]] == ["0", "1", "report", "policy"]


def test_on_a_terminal_each_set_is_one_bar_behind_the_m_step_too(fit_words, tmp_path):
    words = fit_words(tmp_path / "run", **{"trainer.enable_progress_bar": True})
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 40, 120, 0, 0))
    command = [sys.executable, "-m", "restem_lightning", *words]
    with subprocess.Popen(
        command, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm"}
    ) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # how the terminal of an ended process reads
            while part := os.read(ours, 65536):
                shown += part
    os.close(ours)
    assert process.returncode == 0
    lines = shown.decode().split("\n")
    bars = [line for line in lines if "held_out greedy: " in line]
    assert len(bars) == 2, bars  # of the base model, and of ours


def test_a_look_at_d_val_that_would_never_come_is_one_line(restem, fit_words, tmp_path):
    words = fit_words(tmp_path / "run", **{"trainer.val_check_interval": 1000, "evaluation.n": 0})
    result = restem(*words)
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert "trainer.val_check_interval (1000) must be at most the " in result.err


def test_a_run_needs_neither_d_val_nor_held_out_sets(restem, fit_words, tmp_path):
    changes = {"problems.validation": "null", "problems.held_out": "{}", "stop.rule": "none"}
    result = restem(*fit_words(tmp_path / "run", **changes))
    assert (result.code, result.err) == (0, "")
    metrics = read_json(RunDir(tmp_path / "run").iteration(1).metrics)
    assert metrics["evaluation"] == {}
    assert metrics["m_step"]["best_val_reward"] is None
    assert metrics["m_step"]["optimizer_steps"] > 0
