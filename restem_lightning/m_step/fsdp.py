"""FSDP2 for the policy: shards a transformers module in place, by decoder layer."""

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

from restem_lightning.errors import UserError


def shard_policy(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Shards each decoder layer, then the rest (embeddings, final norm, LM head) as one group.

    Each rank must hold the same full weights before. Tied embeddings stay tied, because both
    ends lie in the last group. Parameters are gathered in their own dtype and gradients are
    summed in float32; lower-precision compute comes from autocast, so that one rank and many
    ranks do the same arithmetic (casting inputs would also round the rotary tables).

    Args:
        model: the policy, on any device; moved to the mesh's device.
        mesh: one dimension, the data-parallel ranks.

    Raises:
        UserError: if transformers does not say what the model's decoder layers are.
    """
    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise UserError(
            f"policy architecture ({type(model).__name__}) names no decoder layers that FSDP could"
            " shard; use trainer.strategy=ddp"
        )
    precision = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*layers, model):
        fully_shard(module, mesh=mesh, mp_policy=precision)
