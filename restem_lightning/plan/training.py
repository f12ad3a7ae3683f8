"""The trial of what trains: optimizer steps of the M-step and of a learned verifier.

Each takes real steps with the run's own module and trainer, for only these show the memory: a
micro-batch of as many of the run's prompts, each with a completion of the trial, as the run will
put into one, beside a sampler for D_val where there is one.
"""

import math
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain, cycle, repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from lightning.pytorch import Callback
from transformers import AutoTokenizer

from restem_lightning.completion_store import CompletionStore
from restem_lightning.loop.callback import VALIDATION_CACHE_TOKENS
from restem_lightning.loop.learned import PreferenceParams
from restem_lightning.loop.shared import Loop
from restem_lightning.loop.stage import Policy, eos_ids, load_policy
from restem_lightning.loop.weights import hand_over, release_memory
from restem_lightning.m_step.datamodule import AcceptedDataModule
from restem_lightning.m_step.export import export_policy
from restem_lightning.m_step.packing import StepBatch, TrainingSequence, pack_step
from restem_lightning.m_step.preference import PairSet, PreferenceModule, pair_loader
from restem_lightning.m_step.step_loader import StepLoader
from restem_lightning.plan.costs import Learning
from restem_lightning.problems import Problem
from restem_lightning.prompts import encode_prompt
from restem_lightning.selection.pairs import stream_pairs

OPTIMIZER_STEPS = 5  # at the most; the first is not counted


class MStepTrial(NamedTuple):
    """What the trial of an M-step showed; names and meanings of `Rates`."""

    training_tokens_per_s: float
    m_step_s: float
    hand_over_s: float
    checkpoint_s: float
    policy_bytes: float
    checkpoint_bytes: float


class _Clock(Callback):
    """Times a training: until it starts, until its first step, and each step."""

    def __init__(self, seconds: float, after_first: Callable[[Any], None] = lambda module: None):
        """Starts.

        Args:
            seconds: steps, those behind the first one, end when they took so long.
            after_first: called with the module behind the first step.
        """
        self.seconds, self.after_first = seconds, after_first
        self.times = [time.monotonic()]
        self.steps: list[float] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.times.append(time.monotonic())

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.times.append(time.monotonic())

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, _: int) -> None:
        self.begun = time.monotonic()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, _: int):
        self.steps.append(time.monotonic() - self.begun)
        if len(self.steps) == 1:
            self.after_first(pl_module)
        elif sum(self.steps[1:]) > self.seconds:
            trainer.should_stop = True

    def step_s(self) -> float:
        """Returns the mean of the steps behind the first one."""
        return sum(self.steps[1:]) / len(self.steps[1:])


def spread(problems: Sequence[Problem], num: int) -> list[Problem]:
    """Returns num problems at equal distances, all of them if there are no more."""
    if num >= len(problems):
        return list(problems)
    return [problems[index * len(problems) // num] for index in range(num)]


def real_sequences(
    loop: Loop, completions: Sequence[Sequence[int]], num: int
) -> list[TrainingSequence]:
    """Returns num sequences: prompts of the run's problems, each with the next completion."""
    tokenizer = AutoTokenizer.from_pretrained(loop.base)
    prompts = [
        encode_prompt(loop.template, problem, tokenizer)[0] for problem in spread(loop.train, num)
    ]
    sequences = []
    for index in range(num):
        prompt = prompts[index % len(prompts)]
        ids = np.array([*prompt, *completions[index % len(completions)]], np.int32)
        sequences.append(TrainingSequence(ids, len(prompt), 1.0))
    return sequences


def full_micro_batch(
    sequences: Sequence[TrainingSequence], data: AcceptedDataModule, *, num_ranks: int
) -> StepBatch:
    """Returns what goes through the model at once of a rank's share of an optimizer step.

    As many sequences as one micro-batch takes, where the share has as many: `pack_step` cuts a
    share evenly, but over many steps one comes as near to the limit as this.

    Args:
        sequences: of the optimizer step, all ranks.
        data: settings of the packing.
        num_ranks: that share it.
    """
    share = sequences[: math.ceil(len(sequences) / num_ranks)]

    def packed(num: int) -> StepBatch:
        return pack_step(
            share[:num],
            tokens_per_micro_batch=data.tokens_per_micro_batch,
            shared_prompts=data.shared_prompt_packing,
        )

    sizes = range(1, len(share) + 1)
    return packed(bisect_right(sizes, 1, key=lambda num: len(packed(num).micro_batches)))


def try_m_step(
    cli: Any,
    loop: Loop,
    made: Any,
    sequences: Sequence[TrainingSequence],
    folder: Path,
    *,
    seconds: float,
    look: Callable[[Policy], None],
    num_ranks: int,
) -> MStepTrial:
    """Takes a small step, looks at D_val, takes full ones, saves and exports.

    Args:
        cli: the parsed command line of `restem fit`.
        loop: what the run's iterations would share.
        made: its configured objects, freshly made.
        sequences: of an optimizer step, all ranks.
        folder: for what is saved.
        seconds: about how long the steps may take; one full step is always taken.
        look: draws with the sampler of D_val, which then stays in memory as it does in a run.
        num_ranks: that share an optimizer step.
    """
    full = full_micro_batch(sequences, made.data, num_ranks=num_ranks)
    batches = chain([full_micro_batch(sequences[:1], made.data, num_ranks=1)], repeat(full))
    hand_over_s, checkpoint_s, held = 0.0, 0.0, []

    def first_look(module: Any) -> None:
        nonlocal hand_over_s
        if loop.validation:
            tokens = loop.engine.cache_tokens or VALIDATION_CACHE_TOKENS
            held.append(load_policy(loop.base, replace(loop.engine, cache_tokens=tokens)))
            begun = time.monotonic()
            hand_over(module.model, held[0].sampler)
            hand_over_s = time.monotonic() - begun
            look(held[0])

    class Save(Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            nonlocal checkpoint_s
            begun = time.monotonic()
            trainer.save_checkpoint(folder / "last.ckpt")
            checkpoint_s = time.monotonic() - begun

    clock = _Clock(seconds, first_look)
    trainer = _trainer(cli, made, folder, [clock, Save()], max_steps=OPTIMIZER_STEPS)
    loader = StepLoader(OPTIMIZER_STEPS, lambda _: next(batches), batch_size=1, seed=0)
    trainer.fit(made.model, loader)
    held.clear()
    release_memory()
    begun = time.monotonic()
    export_policy(made.model, folder / "policy", source_policy=made.model.policy)
    export_s = time.monotonic() - begun
    made.model.model = None
    release_memory()
    used = sequences[: full.num_sequences]
    policy_bytes, last_bytes = bytes_below(folder / "policy"), bytes_below(folder / "last.ckpt")
    keeps_best = made.stop.rule != "none"  # its weights alone, beside weights and two moments
    return MStepTrial(
        training_tokens_per_s=sum(len(one.ids) for one in used) / clock.step_s(),
        m_step_s=clock.times[2] - clock.times[0] + export_s,
        hand_over_s=hand_over_s,
        checkpoint_s=checkpoint_s * (1 + keeps_best / 3),
        policy_bytes=policy_bytes,
        # New ones are there before the old ones go.
        checkpoint_bytes=2 * (last_bytes + keeps_best * policy_bytes),
    )


def try_verifier(
    cli: Any,
    loop: Loop,
    made: Any,
    store: CompletionStore,
    folder: Path,
    *,
    num_ranks: int,
) -> Learning:
    """Scores one batch of pairs and takes one optimizer step on it, of full size for the memory.

    Where the trial drew no pair, any of its completions stand for those of pairs, which it counts
    as none.

    Args:
        cli: the parsed command line of `restem fit`.
        loop: what the run's iterations would share.
        made: its configured objects, freshly made.
        store: the pool of the trial's E-step.
        folder: for what is saved.
        num_ranks: that share an optimizer step.
    """
    params: PreferenceParams = made.preference
    drawn = store.read(["problem_id", "completion_ids"])
    pieces = list(stream_pairs([store], eos_ids=eos_ids(loop.base, loop.template)))
    distinct = pa.concat_tables([rows for rows, _ in pieces]) if pieces else drawn.slice(0, 0)
    completions = (distinct if pieces else drawn)["completion_ids"].to_pylist()
    num_mixed = len(distinct["problem_id"].unique())
    batch_size = math.ceil(params.batch_size / num_ranks)
    halves = cycle(completions)
    sequences = [
        TrainingSequence(np.array([*one.prompt, *next(halves)], np.int32), one.prompt_length, 1.0)
        for one in real_sequences(loop, completions, batch_size)
        for _ in ("correct", "incorrect")
    ]
    data = PairSet(sequences, np.arange(len(sequences), dtype=np.int32).reshape(-1, 2))
    module = PreferenceModule(
        loop.base,
        data,
        beta=params.beta,
        learning_rate=params.learning_rate,
        tokens_per_batch=params.tokens_per_batch,
    )
    clock = _Clock(0.0)
    trainer = _trainer(cli, made, folder, [clock], max_steps=1)
    trainer.fit(module, pair_loader(data, batch_size=batch_size, seed=0))
    begun = time.monotonic()
    export_policy(module, folder / "verifier", source_policy=loop.base)
    export_s = time.monotonic() - begun
    module.model = None
    release_memory()
    load_s = clock.times[1] - clock.times[0]
    return Learning(
        mixed_share=num_mixed / len(drawn["problem_id"].unique()),
        pairs=sum(len(pairs) for _, pairs in pieces) / max(1, num_mixed),
        sequences=len(distinct) / max(1, num_mixed),
        pair_s=clock.steps[0] / batch_size,
        sequence_s=(clock.times[2] - clock.times[1]) / len(data.sequences),
        load_s=2 * load_s + export_s,
    )


def _trainer(cli: Any, made: Any, folder: Path, callbacks: list[Callback], **changes: Any) -> Any:
    """Returns the run's trainer without all that it would write."""
    return cli.make_trainer(
        made,
        callbacks=callbacks,
        logger=False,
        default_root_dir=str(folder),
        max_epochs=1,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        **changes,
    )


def bytes_below(path: Path) -> float:
    """Returns the size of a file, or of all files of a folder."""
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    return float(sum(file.stat().st_size for file in files))
