"""A small trial of a run on this machine: the rates that a plan multiplies."""

import math
import resource
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from restem_lightning.completion_store import CompletionStore
from restem_lightning.loop.e_step import fill_store
from restem_lightning.loop.parity import measure_parity
from restem_lightning.loop.shared import Loop
from restem_lightning.loop.stage import Policy, eos_ids, load_policy
from restem_lightning.loop.weights import release_memory
from restem_lightning.plan.costs import Rates, Sampling, Volume
from restem_lightning.plan.training import real_sequences, spread, try_m_step, try_verifier
from restem_lightning.problems import Problem
from restem_lightning.sampler import SamplingParams
from restem_lightning.selection import end_with_eos, select_completions

BATCHES = 2  # of the sampler in the trial's E-step: one fills up, one runs full
GROWING_COLUMNS = {"completion_ids", "text", "logprobs", "sampling_logprobs", "extracted"}


def try_out(
    cli: Any, loop: Loop, made: Any, counts: Volume, *, seconds: float, start_s: float
) -> Rates:
    """Returns the rates of this machine, from some problems, completions and optimizer steps.

    Args:
        cli: the parsed command line of `restem fit`.
        loop: what the run's iterations would share.
        made: its configured objects, freshly made.
        counts: of the run.
        seconds: about how long each kind of completions, and the optimizer steps, may take.
        start_s: that went by before, with libraries and problems.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        before = time.monotonic()
        policy = load_policy(loop.base, loop.engine)
        load_s = time.monotonic() - before
        sampling, store = _try_sampling(loop, policy, folder, seconds)
        del policy
        release_memory()
        parity_s = _try_parity(loop, store)
        selection = select_completions([store], loop.selection)
        num_problems = selection.funnel["num_problems"]
        # A run that accepts nothing stops at once: what an M-step takes is still to be said.
        accepted_per_problem = max(1, selection.funnel["accepted"]) / num_problems
        accepted = end_with_eos(
            _any_completions(store, selection.accepted), eos_ids(loop.base, loop.template)
        )
        completions = accepted["completion_ids"].to_pylist()
        batch_size = min(made.data.batch_size, math.ceil(accepted_per_problem * len(loop.train)))
        sequences = real_sequences(loop, completions, max(1, batch_size))

        def look(policy: Policy) -> None:
            sampling["validation"], _ = _drawn(
                loop, policy, "validation", loop.validation, loop.validation_sampling,
                folder, seconds,
            )  # fmt: skip

        m_step = try_m_step(
            cli, loop, made, sequences, folder,
            seconds=seconds, look=look, num_ranks=counts.num_ranks,
        )  # fmt: skip
        learning = None
        if counts.verifiers:
            learning = try_verifier(cli, loop, made, store, folder, num_ranks=counts.num_ranks)
    # Beside those that may be accepted, one of each problem keeps the usual prompt.
    waiting = selection.funnel["correct"] / num_problems + 1
    return Rates(
        origin=f"measured here in {time.monotonic() - start:.0f} s, on {num_problems} of "
        f"{len(loop.train)} problems"
        + ("" if selection.accepted.num_rows else "; it accepted none, and the plan counts one"),
        sampling=sampling,
        accepted_per_problem=accepted_per_problem,
        accepted_tokens=sum(map(len, completions)) / len(completions),
        prompt_tokens=sum(one.prompt_length for one in sequences) / len(sequences),
        waiting_bytes=waiting * accepted.nbytes / len(accepted),
        memory_bytes=_peak_memory(),
        start_s=start_s,
        load_s=load_s,
        parity_s=parity_s,
        learning=learning,
        **m_step._asdict(),
    )


def _try_parity(loop: Loop, store: CompletionStore) -> float:
    """Returns the seconds of an E-step's check of parity."""
    start = time.monotonic()
    if num := loop.e_step.parity_completions:
        device = loop.engine.resolve_device()
        measure_parity(store, loop.base, num_completions=num, device=device)
        release_memory()
    return time.monotonic() - start if num else 0.0


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
    """Draws twice: a quarter of the sampler's batch, then one batch or two, as time allows."""
    full = max(2, math.ceil(BATCHES * policy.sampler.max_batch_size / params.n))
    took, num = 0.0, max(1, full // 8)
    for place in ("first", "second"):
        some, store = spread(problems, num), CompletionStore(folder / kind / place)
        stage = replace(loop.stage(policy, 0), params=params, purpose=f"plan/{kind}/{place}/")
        start = time.monotonic()
        fill_store(store, some, stage, e_step=loop.e_step, show=f"trial {kind}")
        took = time.monotonic() - start
        # One batch at least: less says little of lengths, of acceptance and of memory.
        num = max(full // BATCHES, min(full, int(num * seconds / took)))
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


def _peak_memory() -> float:
    """Returns the most memory that this process has held: of its GPU, or without one its own."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_reserved())
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
