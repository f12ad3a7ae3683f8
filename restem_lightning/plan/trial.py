"""A small trial of a run on this machine: the rates that a plan multiplies."""

import math
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from lightning.pytorch import Callback

from restem_lightning.completions import CompletionStore
from restem_lightning.errors import UserError
from restem_lightning.loop.callback import VALIDATION_CACHE_TOKENS
from restem_lightning.loop.e_step import fill_store
from restem_lightning.loop.shared import Loop
from restem_lightning.loop.stage import Policy, load_policy
from restem_lightning.loop.weights import release_memory
from restem_lightning.m_step.export import export_policy
from restem_lightning.plan.costs import Rates, Sampling
from restem_lightning.problems import Problem
from restem_lightning.sampler import SamplingParams
from restem_lightning.selection import select_completions, write_accepted

BATCHES = 2  # of the sampler in the trial's E-step: one fills up, one runs full
OPTIMIZER_STEPS = 4  # the first is not counted
GROWING_COLUMNS = {"completion_ids", "text", "logprobs", "sampling_logprobs", "extracted"}


def spread(problems: Sequence[Problem], num: int) -> list[Problem]:
    """Returns num problems at equal distances, all of them if there are no more."""
    if num >= len(problems):
        return list(problems)
    return [problems[index * len(problems) // num] for index in range(num)]


def try_out(cli: Any, loop: Loop, made: Any, *, seconds: float) -> Rates:
    """Returns the rates of this machine, from some problems, completions and optimizer steps.

    Args:
        cli: the parsed command line of `restem fit`.
        loop: what the run's iterations would share.
        made: its configured objects, freshly made.
        seconds: about how long each kind of completions, and the optimizer steps, may take.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        before = time.monotonic()
        policy = load_policy(loop.base, loop.engine)
        load_s = time.monotonic() - before
        sampling, store = _try_sampling(loop, policy, folder, seconds)
        selection = select_completions([store], loop.selection)
        accepted = _any_completions(store, selection.accepted)
        num_problems = selection.funnel["num_problems"]
        tokens = {
            name: len(accepted[name].combine_chunks().flatten()) / len(accepted)
            for name in ("prompt_ids", "completion_ids")
        }
        del policy
        release_memory()
        made.data.accepted = str(folder / "accepted.parquet")
        # A token trained on costs about three of a forward pass; a slow machine takes small steps.
        affordable = seconds * sampling["e_step"].tokens_per_s / (3 * sum(tokens.values()))
        made.data.batch_size = min(made.data.batch_size, max(1, int(affordable / OPTIMIZER_STEPS)))
        write_accepted(made.data.accepted, [accepted])
        clock = _Clock(loop, folder, seconds)
        _take_steps(cli, made, clock, folder)
        if clock.validation is not None:
            sampling["validation"] = clock.validation
        policy_bytes = _bytes_below(folder / "policy")
        # A new one is there before the old one goes; and the best weights.
        checkpoint_bytes = 2 * _bytes_below(folder / "last.ckpt") + policy_bytes
    return Rates(
        origin=f"measured here in {time.monotonic() - start:.0f} s, on {num_problems} of "
        f"{len(loop.train)} problems",
        sampling=sampling,
        accepted_per_problem=selection.funnel["accepted"] / num_problems,
        accepted_tokens=tokens["completion_ids"],
        prompt_tokens=tokens["prompt_ids"],
        training_tokens_per_s=clock.sequences_per_s() * sum(tokens.values()),
        policy_bytes=policy_bytes,
        checkpoint_bytes=checkpoint_bytes,
        memory_bytes=_peak_memory(),
        load_s=load_s,
    )


def _try_sampling(
    loop: Loop, policy: Policy, folder: Path, seconds: float
) -> tuple[dict[str, Sampling], CompletionStore]:
    """Draws a little of each kind of completion; returns the rates and the E-step's store."""
    held_out = [problem for problems in loop.held_out.values() for problem in problems]
    wanted = {"e_step": (loop.train, loop.sampling)}
    wanted |= {kind: (held_out, p) for kind, p in loop.evaluation.stages(loop.sampling).items()}
    rates, stores = {}, {}
    for kind, (problems, params) in wanted.items():
        if problems:
            rates[kind], stores[kind] = _drawn(
                loop, policy, kind, problems, params, folder, seconds
            )
    return rates, stores["e_step"]


def _drawn(
    loop: Loop,
    policy: Policy,
    kind: str,
    problems: list[Problem],
    params: SamplingParams,
    folder: Path,
    seconds: float,
) -> tuple[Sampling, CompletionStore]:
    """Draws twice: an eighth of what fills the sampler's batch, then as much as the time allows."""
    full = max(2, math.ceil(BATCHES * (loop.engine.max_batch_size or 256) / params.n))
    took, num = 0.0, max(1, full // 8)
    for place in ("first", "second"):
        some, store = spread(problems, num), CompletionStore(folder / kind / place)
        stage = replace(loop.stage(policy, 0), params=params, purpose=f"plan/{kind}/{place}/")
        start = time.monotonic()
        fill_store(store, some, stage, e_step=loop.e_step, show=f"trial {kind}")
        took = time.monotonic() - start
        num = max(1, min(full, int(num * seconds / took)))
    num_tokens = num_completions = 0
    for part in store.iter_batches(["completion_ids"]):
        num_tokens += len(part["completion_ids"].flatten())
        num_completions += part.num_rows
    files = list(store.folder.glob("*.parquet"))
    growing = sum(map(_growing_bytes, files))
    stored = sum(file.stat().st_size for file in files)
    rate = Sampling(
        tokens=num_tokens / num_completions,
        tokens_per_s=num_tokens / took,
        completion_bytes=(stored - growing) / num_completions,
        token_bytes=growing / num_tokens,
    )
    return rate, store


def _growing_bytes(file: Path) -> int:
    """Returns the bytes of a part's columns that grow with the length of completions."""
    groups = pq.ParquetFile(file).metadata
    columns = [
        groups.row_group(group).column(column)
        for group in range(groups.num_row_groups)
        for column in range(groups.num_columns)
    ]
    return sum(
        column.total_compressed_size
        for column in columns
        if column.path_in_schema.split(".")[0] in GROWING_COLUMNS
    )


def _any_completions(store: CompletionStore, accepted: pa.Table) -> pa.Table:
    """Returns accepted completions, or where none is correct any: they take as long to train on."""
    if accepted.num_rows:
        return accepted
    table = store.read([name for name in accepted.column_names if name != "weight"])
    ones = pa.repeat(pa.scalar(1.0, pa.float32()), table.num_rows)
    return table.append_column("weight", ones).cast(accepted.schema)


class _Clock(Callback):
    """Times optimizer steps, and does at the end what the loop does beside training weights."""

    def __init__(self, loop: Loop, folder: Path, seconds: float) -> None:
        self.loop, self.folder, self.seconds = loop, folder, seconds
        self.ends: list[float] = []
        self.num_sequences: list[int] = []
        self.validation: Sampling | None = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, _: int):
        self.ends.append(time.monotonic())
        self.num_sequences.append(batch.num_sequences)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.save_checkpoint(self.folder / "last.ckpt")
        export_policy(pl_module, self.folder / "policy", source_policy=pl_module.policy)
        if self.loop.validation:
            loop = self.loop
            tokens = min(
                loop.engine.cache_tokens or VALIDATION_CACHE_TOKENS, VALIDATION_CACHE_TOKENS
            )
            policy = load_policy(loop.base, replace(loop.engine, cache_tokens=tokens))
            self.validation, _ = _drawn(
                loop, policy, "validation", loop.validation, loop.validation_sampling,
                self.folder, self.seconds,
            )  # fmt: skip

    def sequences_per_s(self) -> float:
        """Returns the rate after the first step.

        Raises:
            UserError: there was no second step.
        """
        if len(self.ends) < 2:
            raise UserError("the trial took fewer than 2 optimizer steps; raise trainer.max_steps")
        return sum(self.num_sequences[1:]) / (self.ends[-1] - self.ends[0])


def _take_steps(cli: Any, made: Any, clock: _Clock, folder: Path) -> None:
    """Takes some optimizer steps with the run's own module, data and trainer."""
    trainer = cli.make_trainer(
        made,
        callbacks=[clock],
        logger=False,
        default_root_dir=str(folder),
        max_steps=OPTIMIZER_STEPS,
        max_epochs=OPTIMIZER_STEPS,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(made.model, made.data)
    made.model.model = None
    release_memory()


def _bytes_below(path: Path) -> float:
    """Returns the size of a file, or of all files of a folder."""
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    return float(sum(file.stat().st_size for file in files))


def _peak_memory() -> float:
    """Returns the most memory that this process has held: of its GPU, or without one its own."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_reserved())
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
