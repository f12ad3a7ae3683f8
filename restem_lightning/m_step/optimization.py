"""Clipping and learning rate of an optimizer step."""

import math
from typing import Literal

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

Schedule = Literal["constant", "linear", "cosine"]


def clip_gradients(parameters: list[Tensor], max_norm: float | None) -> Tensor:
    """Scales gradients to a global L2 norm of at most max_norm; returns the norm before.

    The norm is over all ranks' shards: for DTensors torch may leave the sum pending, and
    `full_tensor` completes it.
    """
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if max_norm is not None:
        clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def learning_rate_factor(
    step: int, *, warmup_steps: int, total_steps: float, schedule: Schedule
) -> float:
    """Returns the share of the peak learning rate at an optimizer step (0-based), in (0, 1]."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    left = (total_steps - step) / max(1, total_steps - warmup_steps)
    return left if schedule == "linear" else (1 - math.cos(math.pi * left)) / 2
