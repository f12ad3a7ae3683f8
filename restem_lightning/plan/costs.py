"""What a run will take: its counts from the settings, its rates measured here or on paper.

Everything is a product of a count and a rate. Counts are known from the settings and the problems.
Rates come from a small trial of the real thing (`trial.py`), or from the formulas of `paper.py`
for hardware that is elsewhere. A plan assumes that a trained policy writes completions as long as
those it was trained on, that the share of correct ones stays as it is at the start, and that every
M-step uses all of its epochs.
"""

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, kw_only=True)
class Volume:
    """The counts of a run.

    Args:
        iterations: of E-step and M-step.
        num_problems: of the E-step.
        n: completions of each of them.
        max_per_problem: most accepted of each, None for all.
        max_epochs: passes of an M-step over the accepted dataset.
        completions: kind of completion -> how many one look at the policy draws: `greedy` and
            `sampled` of the held-out sets, `validation` of D_val.
        looks: at D_val in one M-step.
        num_ranks: processes, each with a device of its own.
    """

    iterations: int
    num_problems: int
    n: int
    max_per_problem: int | None
    max_epochs: int
    completions: dict[str, int]
    looks: int
    num_ranks: int


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How completions of one kind come out.

    Args:
        tokens: of one, on average.
        tokens_per_s: of one rank.
        completion_bytes: of one in a parquet part, whatever its length.
        token_bytes: of each of its tokens there.
    """

    tokens: float
    tokens_per_s: float
    completion_bytes: float
    token_bytes: float

    def stored_bytes(self, num: float, tokens: float) -> float:
        """Returns the size of so many completions with so many tokens in all."""
        return num * self.completion_bytes + tokens * self.token_bytes


@dataclass(frozen=True, kw_only=True)
class Rates:
    """The rates of one rank.

    Args:
        origin: where they are from, for the reader.
        sampling: by kind: e_step, and the kinds of `Volume.completions`.
        accepted_per_problem: completions.
        accepted_tokens: of an accepted completion, and so of a trained policy's.
        prompt_tokens: before it.
        training_tokens_per_s: prompt and completion tokens.
        policy_bytes: of a policy folder.
        checkpoint_bytes: of an M-step's checkpoints at the most.
        memory_bytes: of one rank at the most: of the GPU, or of the process where there is none.
        load_s: to load a policy and get ready to sample.
    """

    origin: str
    sampling: dict[str, Sampling]
    accepted_per_problem: float
    accepted_tokens: float
    prompt_tokens: float
    training_tokens_per_s: float
    policy_bytes: float
    checkpoint_bytes: float
    memory_bytes: float
    load_s: float


class Row(NamedTuple):
    """One stage of an iteration, over all ranks.

    Attributes:
        stage: its name.
        items: completions drawn, or sequences trained on (with repeats).
        tokens: drawn, or trained on.
        seconds: of all ranks side by side.
        stored_bytes: that stay on disk.
    """

    stage: str
    items: float
    tokens: float
    seconds: float
    stored_bytes: float


class Plan(NamedTuple):
    """What a run will take.

    Attributes:
        base: the stages before the first iteration: the base model's own measures.
        first: the stages of the first iteration.
        later: the stages of each later one.
        iterations: how many there are.
        seconds: of the whole run.
        device_hours: `seconds` on all ranks.
        drawn_tokens: of the whole run.
        disk_bytes: at the end of the run.
        transient_bytes: of checkpoints beside it while an M-step runs.
        memory_bytes: of one rank at the most.
        origin: of the rates.
    """

    base: list[Row]
    first: list[Row]
    later: list[Row]
    iterations: int
    seconds: float
    device_hours: float
    drawn_tokens: float
    disk_bytes: float
    transient_bytes: float
    memory_bytes: float
    origin: str


def make_plan(volume: Volume, rates: Rates) -> Plan:
    """Returns what a run of these counts takes at these rates."""
    base = _evaluation(volume, rates, None)
    trained = [
        _m_step(volume, rates),
        _drawn("D_val", "validation", volume, rates, rates.accepted_tokens, volume.looks),
        *_evaluation(volume, rates, rates.accepted_tokens),
    ]
    first = [_drawn("E-step", "e_step", volume, rates, None), *trained]
    later = [_drawn("E-step", "e_step", volume, rates, rates.accepted_tokens), *trained]
    rows = [*base, *first, *(volume.iterations - 1) * later]
    num_loads = 1 + 2 * volume.iterations  # the sampler of an E-step, then that of the evaluation
    seconds = sum(row.seconds for row in rows) + num_loads * rates.load_s
    return Plan(
        base=base,
        first=[row for row in first if row.items],
        later=[row for row in later if row.items],
        iterations=volume.iterations,
        seconds=seconds,
        device_hours=seconds / 3600 * volume.num_ranks,
        drawn_tokens=sum(row.tokens for row in rows if row.stage != "M-step"),
        disk_bytes=sum(row.stored_bytes for row in rows),
        transient_bytes=rates.checkpoint_bytes,
        memory_bytes=rates.memory_bytes,
        origin=rates.origin,
    )


def _drawn(
    stage: str, kind: str, volume: Volume, rates: Rates, tokens: float | None, times: int = 1
) -> Row:
    """Returns the row of completions of a kind, of so many tokens each, None for the base model's.

    D_val's are not kept.
    """
    num = {**volume.completions, "e_step": volume.num_problems * volume.n}.get(kind, 0) * times
    if not num:
        return Row(stage, 0, 0, 0, 0)
    one = rates.sampling[kind]
    drawn = num * (one.tokens if tokens is None else tokens)
    stored = 0 if kind == "validation" else one.stored_bytes(num, drawn)
    return Row(stage, num, drawn, drawn / one.tokens_per_s / volume.num_ranks, stored)


def _evaluation(volume: Volume, rates: Rates, tokens: float | None) -> list[Row]:
    kinds = [kind for kind in volume.completions if kind != "validation"]
    return [_drawn(f"evaluation ({kind})", kind, volume, rates, tokens) for kind in kinds]


def _m_step(volume: Volume, rates: Rates) -> Row:
    accepted = rates.accepted_per_problem * volume.num_problems
    one = rates.sampling["e_step"]
    stored = one.stored_bytes(accepted, accepted * rates.accepted_tokens) + rates.policy_bytes
    items = accepted * volume.max_epochs
    tokens = items * (rates.prompt_tokens + rates.accepted_tokens)
    seconds = tokens / rates.training_tokens_per_s / volume.num_ranks
    return Row("M-step", items, tokens, seconds, stored)


def shown(plan: Plan) -> str:
    """Returns a plan as tables."""
    lines = []
    parts = {"base model": plan.base, "iteration 1": plan.first}
    if plan.iterations > 1:
        last = f" to {plan.iterations}" if plan.iterations > 2 else ""
        parts[f"iteration 2{last}{', each' if last else ''}"] = plan.later
    for title, rows in parts.items():
        lines.append(f"{title:24}{'items':>12}{'tokens':>16}{'time':>10}{'disk':>10}")
        lines += [
            f"  {row.stage:22}{row.items:12,.0f}{row.tokens:16,.0f}{_time(row.seconds):>10}"
            f"{_size(row.stored_bytes):>10}"
            for row in rows
        ]
    return "\n".join(
        [
            *lines,
            "",
            f"in all    {_time(plan.seconds)} ({plan.device_hours:.3g} device hours), "
            f"{plan.drawn_tokens:,.0f} tokens drawn",
            f"disk      {_size(plan.disk_bytes)} at the end, and {_size(plan.transient_bytes)} of "
            "checkpoints while an M-step runs",
            f"memory    {_size(plan.memory_bytes)} a rank at the most",
            f"rates     {plan.origin}",
            "M-steps that stop early take less; better policies give more completions to train on.",
        ]
    )


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _size(num_bytes: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes / 1e3:.0f} kB"
