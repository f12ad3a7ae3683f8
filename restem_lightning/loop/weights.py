"""Weights between trainer and sampler: handed over and checked, then let go."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


@contextmanager
def quick_collections() -> Iterator[None]:
    """Keeps what exists by now, the libraries above all, out of `release_memory`'s collections.

    Each of them would otherwise look at half a million objects, a quarter of a second.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()  # or bindings take what is left at exit for leaks, and print a page


def held_memory_mib() -> float | None:
    """Returns what this process holds now, in MiB: of its GPU, or without one of the machine.

    None where the system does not say (no /proc).
    """
    if torch.cuda.is_available():
        return round(torch.cuda.memory_reserved() / 2**20, 1)
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return None
    num_pages = int(statm.read_text().split()[1])
    return round(num_pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)
