"""Which part of a policy and of the batches a rank has."""

import torch
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from restem_lightning.m_step.fsdp import shard_policy
from restem_lightning.m_step.tensor_parallel import split_policy, tensor_group
from restem_lightning.m_step.weights import read_weights


def data_rank(strategy: Strategy | None) -> tuple[int, int]:
    """Returns (rank, number of ranks) among those with batches of their own.

    The ranks of a tensor-parallel group see the same batches.
    """
    if not isinstance(strategy, ParallelStrategy):
        return 0, 1
    ranks = strategy.distributed_sampler_kwargs
    return ranks["rank"], ranks["num_replicas"]


def place_policy(
    model: PreTrainedModel,
    policy: str,
    mesh: DeviceMesh,
    device: torch.device,
    *,
    compute_dtype: torch.dtype | None = None,
    reshard_after_forward: bool = True,
) -> None:
    """Splits and shards an empty policy in place, then reads this rank's part of its weights.

    Args:
        model: from `empty_policy`, with adapters or without.
        policy: folder of its weights.
        mesh: of ModelParallelStrategy.
        device: of this rank.
        compute_dtype: as for `shard_policy`.
        reshard_after_forward: as for `shard_policy`.

    Raises:
        UserError: if the policy cannot be split or sharded, or the folder lacks a weight.
    """
    if (group := tensor_group(mesh)) is not None:
        split_policy(model, group)
    shard_policy(
        model,
        mesh["data_parallel"],
        compute_dtype=compute_dtype,
        reshard_after_forward=reshard_after_forward,
    )
    read_weights(model, policy, device)
