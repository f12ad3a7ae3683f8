"""Learned verifiers in a run: V-STaR's, trained and measured; a scorer in the E-step."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from restem_lightning.completion_store import CompletionStore
from restem_lightning.completions import Completion, Verdict, VerdictKind, from_table
from restem_lightning.loop import learned as learned_module
from restem_lightning.loop.stage import Stage, load_policy, verified_completions
from restem_lightning.m_step.preference import PreferenceModule
from restem_lightning.metrics import best_of_k
from restem_lightning.problems import Problem
from restem_lightning.prompts import FewShotPrompt
from restem_lightning.run_dir import RunDir, read_json, write_json
from restem_lightning.sampler import EngineParams, SamplingParams
from restem_lightning.settings import EMBEDDED_POLICY, VerificationParams, open_verifiers
from restem_lightning.verifiers.composed import ITERATION
from tests.faults.conftest import do_before

ROOT = Path(__file__).parents[2]
LEARN = {"preference.learn": "last", "preference.human": "true", "evaluation.n": 4,
         "preference.batch_size": 48, "preference.max_epochs": 2,
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


# Kills the process before an optimizer step of the verifier.
KILL = """
import os, signal, sys
from restem_lightning.cli import main
from restem_lightning.m_step.preference import PreferenceModule

step = PreferenceModule.training_step

def killing(self, *words):
    if self.global_step == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *words)

PreferenceModule.training_step = killing
main(sys.argv[2:])
"""


@pytest.fixture
def without_verifier(learned, copy_of):
    """A copy of the run as it was before its verifier."""
    run = copy_of(learned.path)
    paths = run.iteration(2)
    shutil.rmtree(paths.verifier)
    shutil.rmtree(paths.verifier_training)
    paths.verifier_json.unlink()
    metrics = read_json(paths.metrics)
    for name in ("best@2", "best@4"):
        del metrics["evaluation"]["held_out"][name]
    write_json(paths.metrics, metrics)
    return run


@pytest.fixture
def steps_of(monkeypatch):
    """The optimizer steps that a verifier takes in this process."""
    steps = []
    step = PreferenceModule.training_step

    def count(self, *words):
        steps.append(self.global_step)
        return step(self, *words)

    monkeypatch.setattr(PreferenceModule, "training_step", count)
    return steps


def same_verifier(run, other):
    """Whether two runs have one verifier, with one record and one set of metrics."""
    paths, others = run.iteration(2), other.iteration(2)
    assert read_json(paths.verifier_json) == read_json(others.verifier_json)
    assert read_json(paths.metrics) == read_json(others.metrics)
    assert not list(paths.verifier_training.glob("*.ckpt"))
    files = (one.verifier / "model.safetensors" for one in (paths, others))
    return len({file.read_bytes() for file in files}) == 1


@pytest.mark.parametrize(
    ("place", "name", "call", "kept"),
    [
        (PreferenceModule, "training_step", 1, "the verifier of iteration 2 up to last-1.ckpt"),
        (PreferenceModule, "training_step", 7, "the verifier of iteration 2 up to last-8.ckpt"),
        (learned_module, "export_policy", 1, "the verifier of iteration 2"),
    ],
)
def test_a_signal_while_the_verifier_learns_changes_nothing(
    place, name, call, kept, without_verifier, learned, restem, fit_words, monkeypatch
):
    words = fit_words(without_verifier.path, iterations=2, **LEARN)
    with monkeypatch.context() as patch:
        do_before(patch, place, name, call, lambda: os.kill(os.getpid(), signal.SIGUSR1))
        stopped = restem(*words)
    assert stopped.code == 75, stopped.err
    assert f"keeps 2 finished iterations and {kept}; go on with" in stopped.err
    assert not without_verifier.iteration(2).verifier_json.exists()
    resumed = restem(*words)
    assert resumed.code == 0, resumed.err
    assert same_verifier(without_verifier, learned)


def test_a_kill_while_the_verifier_learns_costs_the_steps_since_its_last_checkpoint(
    without_verifier, learned, steps_of, restem, fit_words
):
    words = [str(word) for word in fit_words(without_verifier.path, iterations=2, **LEARN)]
    killed = subprocess.run([sys.executable, "-c", KILL, "8", *words], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    (last,) = without_verifier.iteration(2).verifier_training.glob("last-*.ckpt")
    done = int(last.stem.removeprefix("last-"))
    assert 1 < done < 8
    resumed = restem(*words)
    assert resumed.code == 0, resumed.err
    assert steps_of[0] == done
    assert same_verifier(without_verifier, learned)


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


def say_iteration(problem, text):
    """A verifier that finds the iteration that it is told."""
    return Verdict(kind=VerdictKind.WRONG, extracted=str(problem.metadata.get(ITERATION)))


def test_a_verifier_is_told_the_iteration_in_an_e_step_alone():
    policy = load_policy(str(EMBEDDED_POLICY), EngineParams(device="cpu", cache_tokens=4096))
    problem = Problem(problem_id="p", question="How many?", metadata={"kept": 1})
    told = {}
    setting = {"class_path": "callable", "init_args": {"function": f"{__file__}:say_iteration"}}
    with open_verifiers(setting, VerificationParams(deadline_s=60.0)) as verifiers:
        for purpose in ("", "hint/", "validation/", "evaluation/held_out/greedy/"):
            stage = Stage(
                policy=policy, template=FewShotPrompt(), verifiers=verifiers, seed=0, iteration=3,
                params=SamplingParams(n=1, max_new_tokens=2), purpose=purpose,
            )  # fmt: skip
            (judged,) = verified_completions([problem], stage)
            told[purpose] = judged.completion.verdict.extracted
    assert list(told.values()) == ["3", "3", "None", "None"]
