"""What a run will take: its counts from the settings, its rates measured here or on paper.

Everything is a product of a count and a rate, and what is done once. Counts are known from the
settings and the problems. Rates come from a small trial of the real thing (`trial.py`), or from the
formulas of `paper.py` for hardware that is elsewhere. A plan assumes that a trained policy writes
completions as long as those it was trained on, that the share of correct ones stays as it is at the
start, and that every M-step uses all of its epochs.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from restem_lightning.selection.buckets import BUCKET_BYTES

SEQUENCE_BYTES, TOKEN_BYTES = 28, 4  # of what the M-step reads: accepted.index, accepted.ids
INCLUDES = {
    "start": "loading of libraries and problems, check of their references",
    "E-step": "loading of the policy, drawing, verdicts; disk: the pool",
    "parity": "loading of the policy, scores of some completions by the trainer's forward pass",
    "M-step": "loading, optimizer steps, checkpoints, export; disk: accepted dataset and policy",
    "D_val": "loading of the sampler; each look: weights handed over, drawing, verdicts",
    "evaluation": "loading of the policy, drawing, verdicts; disk: the pools",
    "verifier": "loading, scores by the reference, training, export, scores for best@k; disk: it",
}


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
        verifiers: the iterations after which a verifier is learned.
        max_pairs_per_problem: most pairs that it learns from, None for all.
        pair_epochs: passes of its training over the pairs.
        not_counted: settings in use that add or save what these counts do not hold.
    """

    iterations: int
    num_problems: int
    n: int
    max_per_problem: int | None
    max_epochs: int
    completions: dict[str, int]
    looks: int
    num_ranks: int
    verifiers: tuple[int, ...] = ()
    max_pairs_per_problem: int | None = None
    pair_epochs: int = 1
    not_counted: tuple[str, ...] = ()


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
class Learning:
    """How a learned verifier comes about.

    Args:
        mixed_share: problems with a correct and an incorrect completion in one pool, of all.
        pairs: of such a problem, from one pool.
        sequences: distinct ones in these pairs.
        pair_s: of training on one.
        sequence_s: of scoring one.
        load_s: to load it for training and for scoring, and to export it.
    """

    mixed_share: float
    pairs: float
    sequences: float
    pair_s: float
    sequence_s: float
    load_s: float


@dataclass(frozen=True, kw_only=True)
class Rates:
    """The rates of one rank.

    Args:
        origin: where they are from, for the reader.
        sampling: by kind: e_step, and the kinds of `Volume.completions`.
        accepted_per_problem: completions.
        accepted_tokens: of an accepted completion, and so of a trained policy's.
        prompt_tokens: before it.
        waiting_bytes: of a problem's completions while they wait for selection, at the most.
        training_tokens_per_s: prompt and completion tokens.
        policy_bytes: of a policy folder.
        checkpoint_bytes: of an M-step's checkpoints at the most.
        memory_bytes: of one rank at the most: of the GPU, or of the process where there is none.
        start_s: until the first policy is loaded.
        load_s: to load a policy and get ready to sample.
        parity_s: of the check of an E-step, 0 where there is none.
        m_step_s: of an M-step, whatever its length: to load, and to export the policy.
        hand_over_s: of the weights to D_val's sampler.
        checkpoint_s: of what is saved at a look at D_val.
        learning: of a verifier; None where none is learned.
    """

    origin: str
    sampling: dict[str, Sampling]
    accepted_per_problem: float
    accepted_tokens: float
    prompt_tokens: float
    waiting_bytes: float
    training_tokens_per_s: float
    policy_bytes: float
    checkpoint_bytes: float
    memory_bytes: float
    start_s: float
    load_s: float
    parity_s: float
    m_step_s: float
    hand_over_s: float
    checkpoint_s: float
    learning: Learning | None


class Row(NamedTuple):
    """One stage of an iteration, over all ranks.

    Attributes:
        stage: its name.
        items: completions drawn, sequences trained on (with repeats), or a verifier's pairs.
        tokens: drawn, or trained on by the M-step.
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
        base: the stages before the first iteration: the start, the base model's own measures.
        first: the stages of the first iteration.
        later: the stages of each later one.
        verifiers: those that are learned, one a row.
        iterations: how many there are.
        seconds: of the whole run.
        device_hours: `seconds` on all ranks.
        drawn_tokens: of the whole run.
        disk_bytes: at the end of the run.
        transient_bytes: beside it for a while: of checkpoints and what an M-step reads, or of what
            waits for selection.
        memory_bytes: of one rank at the most.
        origin: of the rates.
        not_counted: of `Volume`.
    """

    base: list[Row]
    first: list[Row]
    later: list[Row]
    verifiers: list[Row]
    iterations: int
    seconds: float
    device_hours: float
    drawn_tokens: float
    disk_bytes: float
    transient_bytes: float
    memory_bytes: float
    origin: str
    not_counted: tuple[str, ...]


def make_plan(volume: Volume, rates: Rates) -> Plan:
    """Returns what a run of these counts takes at these rates."""
    base = [Row("start", 0, 0, rates.start_s, 0), *_evaluation(volume, rates, None)]
    trained = [
        Row("parity", 0, 0, rates.parity_s, 0),
        _m_step(volume, rates),
        _d_val(volume, rates),
        *_evaluation(volume, rates, rates.accepted_tokens),
    ]
    first, later = (
        [row for row in [_e_step(volume, rates, tokens), *trained] if row.seconds]
        for tokens in (None, rates.accepted_tokens)
    )
    verifiers = [_verifier(volume, rates, iteration) for iteration in volume.verifiers]
    iterations = [*first, *(volume.iterations - 1) * later]
    seconds = sum(row.seconds for row in [*base, *iterations, *verifiers])
    return Plan(
        base=base,
        first=first,
        later=later,
        verifiers=verifiers,
        iterations=volume.iterations,
        seconds=seconds,
        device_hours=seconds / 3600 * volume.num_ranks,
        drawn_tokens=sum(row.tokens for row in [*base, *iterations] if row.stage != "M-step"),
        disk_bytes=sum(row.stored_bytes for row in [*base, *iterations, *verifiers]),
        transient_bytes=_transient_bytes(volume, rates),
        memory_bytes=rates.memory_bytes,
        origin=rates.origin,
        not_counted=volume.not_counted,
    )


def num_pairs(volume: Volume, learning: Learning, iteration: int) -> float:
    """Returns how many pairs the verifier of an iteration learns from.

    It reads the pools of all iterations so far, and each correct completion of a problem makes a
    pair with each incorrect one: t pools hold t^2 times the pairs of one, until the most is met.
    """
    most = volume.max_pairs_per_problem or math.inf
    of_a_problem = min(iteration**2 * learning.pairs, most)
    return volume.num_problems * learning.mixed_share * of_a_problem


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


def _longer(row: Row, seconds: float) -> Row:
    """Returns a row with what takes so long whatever the number of ranks; an empty one stays."""
    return row._replace(seconds=row.seconds + seconds) if row.items else row


def _e_step(volume: Volume, rates: Rates, tokens: float | None) -> Row:
    return _longer(_drawn("E-step", "e_step", volume, rates, tokens), rates.load_s)


def _d_val(volume: Volume, rates: Rates) -> Row:
    row = _drawn("D_val", "validation", volume, rates, rates.accepted_tokens, volume.looks)
    return _longer(row, rates.load_s + volume.looks * rates.hand_over_s)


def _evaluation(volume: Volume, rates: Rates, tokens: float | None) -> list[Row]:
    """Returns a row for each kind of completions; the policy is loaded once for all of them."""
    kinds = [kind for kind in volume.completions if kind != "validation"]
    rows = [_drawn(f"evaluation ({kind})", kind, volume, rates, tokens) for kind in kinds]
    return [_longer(row, 0 if place else rates.load_s) for place, row in enumerate(rows)]


def _m_step(volume: Volume, rates: Rates) -> Row:
    accepted = rates.accepted_per_problem * volume.num_problems
    one = rates.sampling["e_step"]
    stored = one.stored_bytes(accepted, accepted * rates.accepted_tokens) + rates.policy_bytes
    items = accepted * volume.max_epochs
    tokens = items * (rates.prompt_tokens + rates.accepted_tokens)
    seconds = tokens / rates.training_tokens_per_s / volume.num_ranks
    once = rates.m_step_s + volume.looks * rates.checkpoint_s
    return _longer(Row("M-step", items, tokens, seconds, stored), once)


def _verifier(volume: Volume, rates: Rates, iteration: int) -> Row:
    learning = rates.learning
    pairs = num_pairs(volume, learning, iteration)
    sequences = volume.num_problems * learning.mixed_share * learning.sequences * iteration
    trained = volume.pair_epochs * pairs * learning.pair_s
    scored = min(sequences, 2 * pairs) * learning.sequence_s
    # Ranks share both out; rank 0 alone ranks the sampled completions.
    ranked = volume.completions.get("sampled", 0) * learning.sequence_s
    shared = (trained + scored) / volume.num_ranks
    row = Row(f"verifier {iteration}", volume.pair_epochs * pairs, 0, shared, rates.policy_bytes)
    return _longer(row, ranked + learning.load_s + rates.checkpoint_s)


def _transient_bytes(volume: Volume, rates: Rates) -> float:
    """Returns the most that is on disk only for a while; the two times do not overlap."""
    waiting = volume.num_problems * rates.waiting_bytes
    accepted = rates.accepted_per_problem * volume.num_problems
    num_tokens = min(accepted, volume.num_problems) * rates.prompt_tokens
    num_tokens += accepted * rates.accepted_tokens
    read = accepted * SEQUENCE_BYTES + num_tokens * TOKEN_BYTES
    return max(waiting if waiting > BUCKET_BYTES else 0, rates.checkpoint_bytes + read)


def shown(plan: Plan) -> str:
    """Returns a plan as tables."""
    lines = []
    parts = {"before": plan.base, "iteration 1": plan.first}
    if plan.iterations > 1:
        last = f" to {plan.iterations}" if plan.iterations > 2 else ""
        parts[f"iteration 2{last}{', each' if last else ''}"] = plan.later
    if plan.verifiers:
        parts["learned verifiers"] = plan.verifiers
    for title, rows in parts.items():
        lines.append(f"{title:24}{'items':>12}{'tokens':>16}{'time':>10}{'disk':>10}")
        lines += [
            f"  {row.stage:22}{row.items:12,.0f}{row.tokens:16,.0f}{_time(row.seconds):>10}"
            f"{_size(row.stored_bytes):>10}"
            for row in rows
        ]
    stages = {row.stage.split()[0]: None for rows in parts.values() for row in rows}
    return "\n".join(
        [
            *lines,
            "",
            *(f"{stage:12}{INCLUDES[stage]}" for stage in stages),
            "",
            f"in all    {_time(plan.seconds)} ({plan.device_hours:.3g} device hours), "
            f"{plan.drawn_tokens:,.0f} tokens drawn",
            f"disk      {_size(plan.disk_bytes)} at the end, and for a while "
            f"{_size(plan.transient_bytes)} (checkpoints and token ids of an M-step)",
            f"memory    {_size(plan.memory_bytes)} a rank at the most",
            f"rates     {plan.origin}",
            *(
                [f"without   what {', '.join(plan.not_counted)} add or save"]
                * bool(plan.not_counted)
            ),
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
