"""Weights between trainer and sampler: handed over and checked, then let go."""

import gc

import torch
from torch import nn

from restem_lightning.m_step.weights import policy_weights
from restem_lightning.sampler import Sampler
from restem_lightning.sampler.weights import checksum


def hand_over(model: nn.Module, sampler: Sampler) -> None:
    """Copies the weights in training, adapters merged, to a sampler; every rank must call it.

    Raises:
        RuntimeError: the sampler does not hold them afterwards.
    """
    sampler.update_weights(policy_weights(model))
    if sampler.checksum() != checksum(policy_weights(model), sampler.dtype):
        raise RuntimeError("the sampler does not hold the weights that are being trained")


def release_memory() -> None:
    """Gives memory of dropped models back, so that sampler and trainer never add up."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
