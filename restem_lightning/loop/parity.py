"""Parity: the trainer's own forward pass scores again what the sampler drew.

Sampler and trainer run the same weights through different kernels. If their log-probabilities
part by more than rounding, the sampler drew from another policy than the one that the folder holds
(stale or wrong weights) or its forward pass is wrong, and the accepted dataset is not what it
claims to be.

With d = log p_sampler - log p_trainer of a drawn token, both at T=1: the bounds are max |d| < 1e-4
for float32 on cpu, and mean |d| < 0.01, mean |p_sampler - p_trainer| < 0.005 and KL < 0.015 for all
else. KL is the mean of exp(-d) - 1 + d, which is never negative and hardly varies while d is small.
In bfloat16 some policies pass the bounds on d and p by rounding alone (SmolLM2-135M: 0.024 and
0.008). Then the trainer scores in float32 too, and the sampler may be twice as far from that as the
trainer in bfloat16 is.
"""

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from restem_lightning.completion_store import CompletionStore
from restem_lightning.m_step.likelihood import prompt_groups, token_logprobs
from restem_lightning.m_step.packing import TrainingSequence
from restem_lightning.m_step.weights import load_policy

MAX_TOKENS = 16384  # of prompts and completions together: seconds, whatever the completions' length
TOKENS_PER_BATCH = 4096  # of them at once, what their prompts share counted each time
EXACT_BOUND = 1e-4
BOUNDS = {"mean_abs_dlogp": 0.01, "mean_abs_dp": 0.005, "kl": 0.015}
_COLUMNS = ("prompt_ids", "completion_ids", "logprobs", "engine")


def measure_parity(
    store: CompletionStore, policy: str, *, num_completions: int, device: torch.device
) -> dict[str, Any] | None:
    """Returns how far the trainer's log-probabilities are from those in a pool, as in metrics.json.

    The policy is loaded as the M-step loads it, in the dtype that the pool was drawn in, so that
    what is left are the two ways to compute. It is in memory during the call only.

    Args:
        store: the pool.
        policy: folder of the policy that is said to have drawn it.
        num_completions: how many to score, the first of the pool; fewer if they are long.
        device: where to.

    Returns:
        num_completions, num_tokens, max_abs_dlogp, mean_abs_dlogp, mean_abs_dp, kl (None where it
        is not finite), rounding (the trainer's mean |d| from itself in float32, None if that was
        not needed), dtype, within_bounds; None if there is no token to score.
    """
    rows = list(_first_rows(store, num_completions))
    if not rows:
        return None
    dtype = getattr(torch, json.loads(rows[0]["engine"])["dtype"])
    sampler = torch.cat([torch.tensor(row["logprobs"], dtype=torch.float64) for row in rows])
    trainer = _trainer_logprobs(policy, dtype, rows, device)
    measured, rounding = compare(sampler, trainer), None
    if dtype == torch.float32 and device.type == "cpu":
        within = measured["max_abs_dlogp"] < EXACT_BOUND
    else:
        within = all(measured[name] < bound for name, bound in BOUNDS.items())
    if not within and dtype != torch.float32 and measured["kl"] < BOUNDS["kl"]:
        exact = _trainer_logprobs(policy, torch.float32, rows, device)
        ours, theirs = compare(sampler, exact), compare(trainer, exact)
        within = all(ours[name] < 2 * theirs[name] for name in ("mean_abs_dlogp", "mean_abs_dp"))
        rounding = theirs["mean_abs_dlogp"]
    return {
        "num_completions": len(rows),
        "num_tokens": len(sampler),
        **{name: value if math.isfinite(value) else None for name, value in measured.items()},
        "rounding": rounding,
        "dtype": str(dtype).removeprefix("torch."),
        "within_bounds": within,
    }


def compare(sampler: Tensor, trainer: Tensor) -> dict[str, float]:
    """Returns the distances between two log-probabilities of the same tokens.

    Args:
        sampler: float64 [N].
        trainer: float64 [N].
    """
    d = sampler - trainer
    return {
        "max_abs_dlogp": d.abs().max().item(),
        "mean_abs_dlogp": d.abs().mean().item(),
        "mean_abs_dp": (sampler.exp() - trainer.exp()).abs().mean().item(),
        "kl": (torch.expm1(-d) + d).mean().item(),
    }


def parity_warning(parity: dict[str, Any] | None, policy: str) -> str | None:
    """Returns the line that says that sampler and trainer disagree; None if they agree."""
    if parity is None or parity["within_bounds"]:
        return None
    names = ("max_abs_dlogp", "mean_abs_dlogp", "mean_abs_dp", "kl")
    shown = ", ".join(
        f"{name} {'not finite' if parity[name] is None else format(parity[name], '.2g')}"
        for name in names
    )
    return (
        f"WARNING: the sampler's log-probabilities are not those of the trainer ({shown} over "
        f"{parity['num_tokens']} tokens in {parity['dtype']}). The completions were drawn with "
        f"other weights than {policy} holds, or this model is sampled wrongly: do not trust the "
        "accepted dataset"
    )


def _first_rows(store: CompletionStore, num_completions: int) -> Iterator[dict[str, Any]]:
    """Yields the first completions of a pool that have tokens, up to MAX_TOKENS, at least one."""
    num_rows = num_tokens = 0
    for batch in store.iter_batches(_COLUMNS):
        for row in batch.to_pylist():
            if not row["completion_ids"]:
                continue
            num_rows += 1
            num_tokens += len(row["prompt_ids"]) + len(row["completion_ids"])
            if num_rows > num_completions or (num_rows > 1 and num_tokens > MAX_TOKENS):
                return
            yield row


@torch.no_grad()
def _trainer_logprobs(
    policy: str, dtype: torch.dtype, rows: list[dict[str, Any]], device: torch.device
) -> Tensor:
    """Returns the log-probabilities of the completions' tokens as the M-step's loss sees them.

    Returns:
        float64 [N] on the CPU, completions one after the other.
    """
    model = load_policy(policy, dtype).to(device)
    sequences = [
        TrainingSequence(
            np.array([*row["prompt_ids"], *row["completion_ids"]], np.int32),
            len(row["prompt_ids"]),
            1.0,
        )
        for row in rows
    ]
    logprobs: list[Tensor] = [torch.empty(0)] * len(rows)
    for some in prompt_groups(sequences, tokens_per_batch=TOKENS_PER_BATCH):
        drawn, sequence_of = token_logprobs(model, [sequences[n] for n in some], device)
        for place, number in enumerate(some):
            logprobs[number] = drawn[sequence_of == place].double().cpu()
    return torch.cat(logprobs)
