"""DPO of a verifier: likelihoods, the loss by hand, and what a few steps do."""

import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from lightning.pytorch import Trainer
from transformers import AutoModelForCausalLM

from restem_lightning.m_step import likelihood
from restem_lightning.m_step.likelihood import all_logprobs, sequence_logprobs
from restem_lightning.m_step.packing import TrainingSequence
from restem_lightning.m_step.preference import (
    PairSet,
    PreferenceModule,
    pair_loader,
    preference_loss,
    read_pairs,
    remove_pairs,
    write_pairs,
)
from restem_lightning.settings import EMBEDDED_POLICY

CPU = torch.device("cpu")
ROWS = [([5, 9, 3], [7, 2]), ([4], [6, 1, 8, 2, 5]), ([3, 3, 3, 3], [9])]


def sequences(rows=ROWS):
    return [
        TrainingSequence(np.array([*prompt, *completion], dtype=np.int32), len(prompt), 1.0)
        for prompt, completion in rows
    ]


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(EMBEDDED_POLICY, dtype=torch.float32).eval()


@torch.no_grad()
def alone(model, prompt, completion):
    """Log-probability of a completion by Hugging Face's own forward."""
    logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].log_softmax(-1)
    place = len(prompt) - 1
    return sum(logits[place + i, token].item() for i, token in enumerate(completion))


def test_padded_sequences_have_the_likelihood_that_each_has_alone(model):
    expected = [alone(model, *row) for row in ROWS]
    with torch.no_grad():
        together = sequence_logprobs(model, sequences(), CPU)
    assert together.tolist() == pytest.approx(expected, abs=1e-4)
    for tokens in (1, 7, 1000):
        one_by_one = all_logprobs(model, sequences(), CPU, tokens_per_batch=tokens)
        assert one_by_one.tolist() == pytest.approx(expected, abs=1e-4)


def test_the_loss_is_the_formula():
    margins = torch.tensor([0.0, 2.0])
    expected = (math.log(2) + math.log1p(math.exp(-0.5 * 2.0))) / 2
    assert preference_loss(margins, beta=0.5).item() == pytest.approx(expected, rel=1e-6)


def test_pairs_and_their_sequences_survive_the_files(tmp_path):
    def piece(rows, pairs):
        prompts, completions = zip(*rows, strict=True)
        lists = [pa.array(one, pa.list_(pa.int32())) for one in (prompts, completions)]
        return pa.table(lists, ["prompt_ids", "completion_ids"]), np.array(pairs)

    pieces = [piece(ROWS[:2], [(0, 1)]), piece(ROWS[2:], [(2, 2)])]
    write_pairs(tmp_path / "pairs", pieces)
    data = read_pairs(tmp_path / "pairs")
    assert data.pairs.tolist() == [[0, 1], [2, 2]]
    for found, expected in zip(data.sequences, sequences(), strict=True):
        assert found.ids.tolist() == expected.ids.tolist()
        assert found[1:] == expected[1:]
    remove_pairs(tmp_path / "pairs")
    assert list(tmp_path.iterdir()) == []


def test_scores_do_not_depend_on_how_many_sequences_are_read_at_a_time(model, monkeypatch):
    at_once = all_logprobs(model, sequences(), CPU, tokens_per_batch=1000)
    monkeypatch.setattr(likelihood, "HELD_SEQUENCES", 2)
    in_turn = all_logprobs(model, sequences(), CPU, tokens_per_batch=1000)
    assert in_turn.tolist() == pytest.approx(at_once.tolist(), abs=1e-4)


def test_training_starts_at_log_2_and_makes_correct_ones_likelier_than_incorrect_ones(
    model, tmp_path
):
    prompt = (5, 9, 3)
    rows = [(prompt, (7, 2)), (prompt, (8, 2)), (prompt, (7, 1))]
    data = PairSet(sequences(rows), np.array([(0, 1), (2, 1)]))
    module = PreferenceModule(
        str(EMBEDDED_POLICY), data, beta=0.1, learning_rate=1e-3, tokens_per_batch=64
    )
    losses = []
    module.log = lambda name, value, **_: name == "verifier_loss" and losses.append(value.item())
    Trainer(
        accelerator="cpu", devices=1, max_epochs=4, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    ).fit(module, pair_loader(data, batch_size=2, seed=0))  # fmt: skip
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < losses[0] - 0.01
    good, bad = (all_logprobs(module.model, sequences([(prompt, ids)]), CPU, tokens_per_batch=64)
                 for ids in ((7, 2), (8, 2)))  # fmt: skip
    before = alone(model, prompt, (7, 2)) - alone(model, prompt, (8, 2))
    assert (good - bad).item() > before
