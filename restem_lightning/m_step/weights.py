"""Weights on their way in and out: policy folder -> this rank's shards -> whole tensors by name."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from restem_lightning.errors import UserError
from restem_lightning.m_step.attention import ATTENTION_NAME, check_attention
from restem_lightning.m_step.lora import is_adapter, merged
from restem_lightning.m_step.loss import weighted_loss
from restem_lightning.m_step.shards import local, local_index, whole
from restem_lightning.pretrained import load_whole


def load_policy(policy: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Returns the policy in training mode, without dropout and KV cache, behind packed attention.

    Raises:
        UserError: if its attention cannot be replaced by ours, or weights are missing.
    """
    options = {"config": training_config(policy), "attn_implementation": ATTENTION_NAME}
    model = load_whole(AutoModelForCausalLM, policy, dtype=dtype, **options)
    return _for_training(model)


def empty_policy(policy: str, dtype: torch.dtype) -> PreTrainedModel:
    """Returns the same without its weights: parameters on the meta device, buffers as they are.

    Buffers that no checkpoint holds (rotary frequencies, Gemma's embedding scale) are computed when
    a module is made; on the meta device they would be lost.

    Raises:
        UserError: if its attention cannot be replaced by ours.
    """
    config = training_config(policy)
    with _parameters_on_meta():
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=ATTENTION_NAME
        )
    model.tie_weights()  # each end got a parameter of its own, and FSDP would shard both
    return _for_training(model)


def _for_training(model: PreTrainedModel) -> PreTrainedModel:
    """Gives the model the M-step's loss as a method; from_pretrained leaves it in eval mode."""
    model.weighted_loss = MethodType(weighted_loss, model)
    return model.train()


def training_config(policy: str) -> PretrainedConfig:
    """Returns the policy's config with dropout and KV cache off.

    Raises:
        UserError: if its attention cannot be replaced by ours.
    """
    config = AutoConfig.from_pretrained(policy)
    check_attention(config, MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), type(config)))
    for name, value in vars(config).items():
        if isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
            setattr(config, name, 0.0)
    config.use_cache = False
    return config


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Sends each parameter to the meta device as soon as its module has it."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, None if parameter is None else nn.Parameter(parameter.to("meta")))

    nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


@torch.no_grad()
def read_weights(model: PreTrainedModel, policy: str, device: torch.device) -> None:
    """Gives an empty policy its memory and weights; each rank reads its shards only.

    Args:
        model: from `empty_policy`, sharded or not; adapters get memory only.
        policy: folder with safetensors.
        device: where to.

    Raises:
        UserError: if the folder lacks a weight, under the name that the model has for it.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to_empty(device=device)
    model.tie_weights()  # to_empty gives each end a tensor of its own
    files = {}
    for file in sorted(Path(policy).glob("*.safetensors")):
        handle = safe_open(file, framework="pt")
        files |= dict.fromkeys(handle.keys(), handle)
    persistent = set(model.state_dict())  # old folders hold rotary frequencies too, rounded
    for name, buffer in model.named_buffers():
        stored = name in files and name in persistent
        buffer.copy_(files[name].get_tensor(name) if stored else buffers[name])
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            continue  # see `start_adapters`
        plain = name.replace(".base_layer", "")
        if plain not in files:
            raise UserError(
                f"policy ({policy}) has no weight {plain}: this family's weights have other names"
                " on disk than in memory, which FSDP cannot load; use trainer.strategy=ddp"
            )
        if local(parameter).numel():  # safetensors has no empty slices
            local(parameter).copy_(files[plain].get_slice(plain)[local_index(parameter)])


def reshard(model: nn.Module) -> None:
    """Gives back what a forward pass leaves gathered, in the compute dtype."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def policy_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields each weight of the policy as a whole tensor, adapters merged; one at a time.

    Every rank must go through all of them. Tied weights come once.
    """
    reshard(model)
    adapted = {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            continue
        weight, layer_name = whole(parameter), name.removesuffix(".base_layer.weight")
        if layer_name in adapted and layer_name != name:
            layer = adapted[layer_name]
            low, high = (side["default"].weight for side in (layer.lora_A, layer.lora_B))
            weight = merged(layer, weight, whole(low), whole(high))
        yield name.replace(".base_layer", ""), weight
