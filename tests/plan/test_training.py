"""The trial trains on what a run does at once: a full micro-batch, beside D_val's sampler."""

import gc

import numpy as np
import pytest
from lightning.pytorch import Callback

from restem_lightning.fit import make_cli
from restem_lightning.m_step.datamodule import AcceptedDataModule
from restem_lightning.m_step.packing import TrainingSequence, pack_step
from restem_lightning.plan.command import PlanCLI, opened, volume
from restem_lightning.plan.training import full_micro_batch
from restem_lightning.plan.trial import try_out
from restem_lightning.sampler import Sampler


def some_sequences(num, *, preamble=30, own=20):
    """Sequences with one preamble, then questions and completions of their own."""
    rng = np.random.default_rng(0)
    first = np.arange(preamble)
    return [
        TrainingSequence(
            np.r_[first, rng.integers(100, 999, own + number % 7)].astype(np.int32),
            preamble + 5,
            1.0,
        )
        for number in range(num)
    ]


def num_tokens(step):
    (micro_batch,) = step.micro_batches
    return micro_batch.input_ids.numel()


@pytest.mark.parametrize("shared", [True, False])
def test_a_long_step_is_cut_where_a_micro_batch_is_full(shared):
    """As near to the limit as the largest micro-batch of any of a run's steps, and not over it."""
    data = AcceptedDataModule(tokens_per_micro_batch=400, shared_prompt_packing=shared)
    sequences = some_sequences(200)
    steps = [
        pack_step(sequences[at : at + size], tokens_per_micro_batch=400, shared_prompts=shared)
        for size in range(2, 40)
        for at in range(0, 160, 20)
    ]
    largest = max(batch.input_ids.numel() for step in steps for batch in step.micro_batches)
    planned = num_tokens(full_micro_batch(sequences, data, num_ranks=1))
    assert 0.95 * largest <= planned <= 400


def test_a_short_step_is_one_micro_batch_and_ranks_share_it():
    data = AcceptedDataModule(tokens_per_micro_batch=4000)
    sequences = some_sequences(10)
    assert full_micro_batch(sequences, data, num_ranks=1).num_sequences == 10
    assert full_micro_batch(sequences, data, num_ranks=4).num_sequences == 3


def test_one_sequence_goes_however_long_it_is():
    data = AcceptedDataModule(tokens_per_micro_batch=8)
    assert full_micro_batch(some_sequences(3), data, num_ranks=1).num_sequences == 1


class Watch(Callback):
    """Notes the tokens of each optimizer step and how many samplers are in memory there."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if hasattr(batch, "micro_batches"):
            tokens = [one.input_ids.numel() for one in batch.micro_batches]
            samplers = sum(type(one) is Sampler for one in gc.get_objects())
            self.seen.append((tokens, samplers))


def test_counted_steps_are_full_and_the_sampler_of_d_val_stays_beside_them(fit_words, tmp_path):
    words = fit_words(
        tmp_path / "run",
        **{
            "data.batch_size": 64,
            "data.tokens_per_micro_batch": 500,
            "selection.max_per_problem": 4,
        },
    )[1:]
    cli = make_cli(words, PlanCLI, verb="plan")
    with opened(cli, needs_weights=True) as (loop, made):
        watch = Watch()
        made.trainer.callbacks = [watch]
        counts = volume(cli, loop, made.preference)
        rates = try_out(cli, loop, made, counts, seconds=1.0, start_s=0.0)
    (first, _), *counted = watch.seen
    assert first < [200]
    assert counted
    for tokens, samplers in counted:
        assert len(tokens) == 1
        assert 400 < tokens[0] <= 500
        assert samplers == 1
    assert rates.training_tokens_per_s > 0
    assert rates.parity_s > 0
