"""Weights between trainer and sampler: handed over and checked, then let go."""

import gc
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from restem_lightning.sampler import Sampler
from restem_lightning.sampler.weights import checksum


def hand_over(model: nn.Module, sampler: Sampler) -> None:
    """Copies the weights in training to a sampler; every rank must call it.

    Raises:
        RuntimeError: the sampler does not hold them afterwards.
    """
    sampler.update_weights(live_weights(model))
    if sampler.checksum() != checksum(live_weights(model), sampler.dtype):
        raise RuntimeError("the sampler does not hold the weights that are being trained")


def live_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields each parameter by name as a whole tensor; every rank must go through all of them."""
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def release_memory() -> None:
    """Gives memory of dropped models back, so that sampler and trainer never add up."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
