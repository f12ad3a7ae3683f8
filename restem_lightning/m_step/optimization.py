"""Clipping and learning rate of an optimizer step."""

import functools
import math
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from restem_lightning.m_step.shards import whole

Schedule = Literal["constant", "linear", "cosine"]


def clip_gradients(parameters: list[Tensor], max_norm: float | None) -> Tensor:
    """Scales gradients to a global L2 norm of at most max_norm; returns the norm before.

    The norm is over all ranks' shards: for DTensors torch may leave the sum pending, and
    `full_tensor` completes it. It takes those of one mesh at a time.
    """
    on_mesh: dict[DeviceMesh | None, list[Tensor]] = {}
    for each in parameters:
        if each.grad is not None:
            mesh = each.grad.device_mesh if isinstance(each.grad, DTensor) else None
            on_mesh.setdefault(mesh, []).append(each)
    norms = [whole(get_total_norm([p.grad for p in group])) for group in on_mesh.values()]
    norm = functools.reduce(torch.hypot, norms)
    if max_norm is not None:
        for group in on_mesh.values():
            clip_grads_with_norm_(group, max_norm, norm)
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
