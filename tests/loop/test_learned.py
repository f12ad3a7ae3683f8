"""Learned verifiers in a run: V-STaR's, trained and measured; a scorer in the E-step."""

import json
from collections import defaultdict
from collections.abc import Sequence

import pytest
import torch
from transformers import AutoModelForCausalLM

from restem_lightning.completions import Completion, CompletionStore, from_table
from restem_lightning.metrics import best_of_k
from restem_lightning.problems import Problem
from restem_lightning.run_dir import RunDir, read_json

LEARN = {"preference.learn": "last", "preference.human": "true", "evaluation.n": 4,
         "evaluation.ks": [1, 2, 4], "preference.learning_rate": 1e-3,
         "problems.held_out.held_out.init_args.num": 4, "trainer.max_epochs": 1,
         "mix.earlier": "true", "mix.human": "all"}  # fmt: skip


class Even:
    """Scores 1 if a completion has an even number of tokens."""

    name, version = "even", "1"

    def score(self, judged: Sequence[tuple[Problem, Completion]]) -> list[float]:
        return [float(len(one.completion_ids) % 2 == 0) for _, one in judged]

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def learned(restem, fit_words, tmp_path_factory):
    """A run of two iterations with a verifier behind the last one."""
    run = RunDir(tmp_path_factory.mktemp("learned") / "run")
    result = restem(*fit_words(run.path, iterations=2, **LEARN))
    assert result.code == 0, result.err
    return run


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def test_the_verifier_learns_from_the_pools_of_all_iterations(learned):
    record = read_json(learned.iteration(2).path / "verifier.json")
    correct, wrong, human = defaultdict(set), defaultdict(set), 0
    for iteration in (1, 2):
        for one in from_table(CompletionStore(learned.iteration(iteration).completions).read()):
            ids = tuple(one.completion_ids)
            kind = one.verdict.kind.value
            into = correct if kind == "CORRECT" else wrong if kind != "ERROR" else {}
            if one.finish_reason != "length" and ids[-1] != 1:
                ids = (*ids, 1)
            into[one.problem_id].add(ids)
    product = sum(len(correct[name]) * len(wrong[name]) for name in wrong)
    human = sum(len(wrong[name]) for name in wrong)  # one human solution for each problem
    assert product <= record["num_pairs"] <= product + human
    assert record["num_pairs"] > product
    assert not (learned.iteration(1).path / "verifier").exists()


def test_the_verifier_is_a_policy_folder_that_differs_from_base_and_generator(learned):
    paths = learned.iteration(2)
    verifier, start = weights(paths.path / "verifier"), weights(read_json(
        paths.path / "verifier.json")["started_from"])  # fmt: skip
    generator = weights(paths.policy)
    assert any(not torch.equal(verifier[name], start[name]) for name in start)
    assert any(not torch.equal(verifier[name], generator[name]) for name in generator)


@torch.no_grad()
def test_best_of_k_ranks_the_sampled_completions_by_the_verifiers_own_likelihood(learned):
    paths = learned.iteration(2)
    model = AutoModelForCausalLM.from_pretrained(paths.path / "verifier", dtype=torch.float32)
    by_problem = defaultdict(list)
    place = paths.path / "evaluation" / "held_out" / "sampled"
    for one in from_table(CompletionStore(place).read()):
        ids = torch.tensor([one.prompt_ids + one.completion_ids])
        logprobs = model.eval()(input_ids=ids).logits[0, len(one.prompt_ids) - 1 : -1]
        chosen = logprobs.log_softmax(-1).gather(1, torch.tensor(one.completion_ids)[:, None])
        by_problem[one.problem_id].append((one.verdict.kind.value == "CORRECT", chosen.sum()))
    metrics = read_json(paths.metrics)["evaluation"]["held_out"]
    for k in (2, 4):
        values = [best_of_k(*zip(*rows, strict=True), k) for rows in by_problem.values()]
        assert metrics[f"best@{k}"]["value"] == pytest.approx(sum(values) / len(values), abs=1e-6)
    assert "best@1" not in metrics


def test_a_finished_run_that_lacks_its_verifier_gets_it_and_nothing_else(
    learned, copy_of, restem, fit_words
):
    run = copy_of(learned.path)
    before = read_json(run.iteration(2).path / "verifier.json")
    policy = (run.iteration(2).policy / "model.safetensors").read_bytes()
    trained = (run.iteration(2).path / "verifier" / "model.safetensors").read_bytes()
    (run.iteration(2).path / "verifier.json").unlink()
    (run.iteration(2).path / "verifier").rename(run.path / "away")
    result = restem(*fit_words(run.path, iterations=2, **LEARN))
    assert result.code == 0, result.err
    assert read_json(run.iteration(2).path / "verifier.json") == before
    assert (run.iteration(2).path / "verifier" / "model.safetensors").read_bytes() == trained
    assert (run.iteration(2).policy / "model.safetensors").read_bytes() == policy


def test_a_scorer_joins_the_verdicts_of_the_e_step_and_of_nothing_else(restem, fit_words, tmp_path):
    run = RunDir(tmp_path / "run")
    scorer = json.dumps({"class_path": "tests.loop.test_learned.Even"})
    changes = {"scoring.scorer": scorer, "trainer.max_epochs": 1}
    result = restem(*fit_words(run.path, **changes))
    assert result.code == 0, result.err
    for one in from_table(CompletionStore(run.iteration(1).completions).read()):
        parts = json.loads(one.verdict.detail)
        assert parts["learned"][1] == float(len(one.completion_ids) % 2 == 0)
        both = parts["verifier"][0] == parts["learned"][0] == "CORRECT"
        assert (one.verdict.kind.value == "CORRECT") == both
    held_out = run.iteration(1).path / "evaluation" / "held_out" / "sampled"
    assert set(CompletionStore(held_out).read(["detail"])["detail"].to_pylist()) == {""}
