"""The optimizer's state from one M-step to the next, sharded or not."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from restem_lightning.run_dir import atomic_path


def save_optimizer(model: nn.Module, optimizer: Optimizer, path: Path) -> None:
    """Writes the state by parameter names, whole, on rank 0; every rank must call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    if not dist.is_initialized() or dist.get_rank() == 0:
        with atomic_path(path) as temporary:
            torch.save(state, temporary)


def load_optimizer(model: nn.Module, optimizer: Optimizer, path: Path) -> None:
    """Gives an optimizer the state that `save_optimizer` wrote; every rank must call it."""
    state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(model, optimizer, state, options=options)
