"""FSDP2 for the policy: shards a transformers module in place, by decoder layer."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from transformers import PreTrainedModel

from restem_lightning.errors import UserError


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Returns the blocks that transformers says must stay whole."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def shard_policy(
    model: PreTrainedModel,
    mesh: DeviceMesh,
    *,
    compute_dtype: torch.dtype | None = None,
    reshard_after_forward: bool = True,
) -> None:
    """Shards each decoder layer, then the rest (embeddings, final norm, LM head) as one group.

    Tied embeddings stay tied, because both ends lie in the last group. Parameters, and with them
    Adam's moments, are sharded in their own dtype; they are gathered in compute_dtype, and
    gradients are summed over ranks in float32. Inputs are not cast: that would round the rotary
    tables.

    Args:
        model: the policy, on any device, meta too; its method weighted_loss, which is called in
            the place of forward, gets what FSDP does around forward.
        mesh: one dimension, the data-parallel ranks.
        compute_dtype: of the gathered parameters; None for their own.
        reshard_after_forward: whether a layer is given back after its forward pass and gathered
            again for its backward pass.

    Raises:
        UserError: if transformers does not say what the model's decoder layers are.
    """
    layers = decoder_layers(model)
    if not layers:
        raise UserError(
            f"policy architecture ({type(model).__name__}) names no decoder layers that FSDP could"
            " shard; use trainer.strategy=ddp"
        )
    precision = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for module in layers:
        fully_shard(
            module, mesh=mesh, mp_policy=precision, reshard_after_forward=reshard_after_forward
        )
    fully_shard(model, mesh=mesh, mp_policy=precision)  # its backward pass comes at once
    register_fsdp_forward_method(model, "weighted_loss")
