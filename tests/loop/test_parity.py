"""Parity with the trainer: what the sampler recorded is what the trainer computes, or an alarm."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from restem_lightning.completion_store import CompletionStore
from restem_lightning.loop.e_step import EStepParams, fill_store
from restem_lightning.loop.parity import compare, measure_parity, parity_warning
from restem_lightning.loop.stage import Stage, load_policy
from restem_lightning.problems import WordProblems, write_problems
from restem_lightning.prompts import FewShotPrompt
from restem_lightning.run_dir import read_json
from restem_lightning.sampler import EngineParams, SamplingParams
from restem_lightning.settings import EMBEDDED_POLICY
from restem_lightning.verifiers import VerifierPool, VerifierSpec

EASY = f"{Path(__file__).with_name('easy_verifier.py')}:EasyVerifier"
CPU = torch.device("cpu")


@pytest.fixture
def draw(tmp_path):
    """Draws a pool of 40 completions with the embedded policy, its weights moved by some noise."""

    def run(dtype, noise=0.0):
        engine = EngineParams(device="cpu", dtype=dtype, max_batch_size=64, cache_tokens=16384)
        policy = load_policy(str(EMBEDDED_POLICY), engine)
        generator = torch.Generator().manual_seed(0)
        policy.sampler.update_weights(
            (name, weight + noise * weight.std() * torch.randn(weight.shape, generator=generator))
            if weight.ndim == 2
            else (name, weight)
            for name, weight in load_file(EMBEDDED_POLICY / "model.safetensors").items()
        )
        store = CompletionStore(tmp_path / "pool")
        with VerifierPool(VerifierSpec(class_path=EASY)) as verifiers:
            stage = Stage(
                policy=policy,
                template=FewShotPrompt(question_format="Q: {question}\nA:\n"),
                verifiers=verifiers,
                params=SamplingParams(n=4, max_new_tokens=40),
                seed=0,
                iteration=1,
            )
            fill_store(store, WordProblems("train", 10).load(), stage, e_step=EStepParams())
        return store

    return run


def parity_of(store, num=32):
    return measure_parity(store, str(EMBEDDED_POLICY), num_completions=num, device=CPU)


def test_in_float32_the_trainer_agrees_to_the_last_digits(draw):
    store = draw("float32")
    parity = parity_of(store)
    assert parity["max_abs_dlogp"] < 1e-4
    assert parity["within_bounds"] is True
    assert parity_warning(parity, "p") is None
    first = store.read(["completion_ids"])["completion_ids"].to_pylist()[:32]
    assert parity["num_completions"] == 32
    assert parity["num_tokens"] == sum(map(len, first))
    assert parity_of(store) == parity
    assert parity_of(store, 1000)["num_completions"] == 40


def test_in_bfloat16_rounding_is_no_alarm(draw):
    parity = parity_of(draw("bfloat16"))
    assert parity["dtype"] == "bfloat16"
    assert parity["within_bounds"] is True
    assert parity["max_abs_dlogp"] > 1e-4


@pytest.mark.parametrize(("dtype", "noise"), [("float32", 1e-3), ("bfloat16", 0.1)])
def test_weights_that_are_not_those_of_the_folder_are_an_alarm(dtype, noise, draw):
    parity = parity_of(draw(dtype, noise))
    assert parity["within_bounds"] is False
    line = parity_warning(parity, "some/policy")
    assert "WARNING" in line
    assert "some/policy" in line
    assert "\n" not in line


def test_measures_are_what_they_are_called():
    sampler = torch.tensor([0.5, 0.25], dtype=torch.float64).log()
    trainer = torch.tensor([0.25, 0.5], dtype=torch.float64).log()
    measured = compare(sampler, trainer)
    assert measured["max_abs_dlogp"] == pytest.approx(math.log(2))
    assert measured["mean_abs_dlogp"] == pytest.approx(math.log(2))
    assert measured["mean_abs_dp"] == pytest.approx(0.25)
    # exp(-d) - 1 + d for d = log 2 and -log 2
    assert measured["kl"] == pytest.approx((0.5 + 2 - 2) / 2)
    assert set(compare(sampler, sampler).values()) == {0.0}


def test_a_log_probability_that_is_not_a_number_is_out_of_bounds(draw):
    store = draw("float32")
    part = store.parts()[0]
    completions = [one for name in part.problem_ids for one in store.completions_of(name)]
    completions[0].logprobs[0] = math.nan
    store.delete_part(part.index)
    store.write_part(part.index, completions)
    parity = parity_of(store)
    assert (parity["within_bounds"], parity["kl"]) == (False, None)
    assert "not finite" in parity_warning(parity, "p")
    json.dumps(parity, allow_nan=False)


def test_every_e_step_of_a_run_is_checked(finished):
    for iteration in (1, 2):
        parity = read_json(finished.iteration(iteration).metrics)["e_step"]["parity"]
        assert parity["num_completions"] == 32
        assert parity["within_bounds"] is True
        assert parity["max_abs_dlogp"] < 1e-4
    assert "sampler against trainer" in finished.report.read_text()


def test_a_policy_folder_that_changed_behind_the_sampler_is_a_loud_line(
    finished, copy_of, restem, fit_words, callbacks
):
    run = copy_of(finished.path)
    paths = run.iteration(2)
    for name in ("m_step", "policy"):
        shutil.rmtree(paths.path / name)
    shutil.rmtree(paths.path / "evaluation")
    for file in (paths.manifest, paths.metrics, paths.path / "parity.json"):
        file.unlink()
    policy = run.iteration(1).policy
    weights = load_file(policy / "model.safetensors")
    noisy = {
        name: weight * (1 + 0.01 * torch.randn_like(weight)) for name, weight in weights.items()
    }
    save_file(noisy, policy / "model.safetensors", {"format": "pt"})
    result = restem(*fit_words(run.path, iterations=2, **{"trainer.callbacks": callbacks}))
    assert result.code == 0
    assert result.err.count("\n") == 1
    assert "restem fit: iteration 2: WARNING: the sampler's log-probabilities" in result.err
    assert str(policy) in result.err
    assert read_json(paths.metrics)["e_step"]["parity"]["within_bounds"] is False
    assert "NO: do not trust" in run.report.read_text()


def test_sampling_alone_is_checked_too(restem, tmp_path):
    write_problems(tmp_path / "p.jsonl", WordProblems("train", 4).load())
    result = restem(
        *("sample", "--problems", tmp_path / "p.jsonl", "--output", tmp_path / "out"),
        *("--sampling.n", 2, "--sampling.max_new_tokens", 24, "--engine.device", "cpu"),
    )
    assert (result.code, result.err) == (0, "")
    parity = read_json(tmp_path / "out" / "parity.json")
    assert (parity["num_completions"], parity["within_bounds"]) == (8, True)
