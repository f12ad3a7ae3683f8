"""Policy folder or live weights -> the sampler's module; a checksum that tells stale weights."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from restem_lightning.errors import UserError
from restem_lightning.pretrained import load_whole
from restem_lightning.sampler.attention import ATTENTION_NAME


def load_module(policy: str | Path, *, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Returns the policy's causal language model in eval mode behind our attention.

    Args:
        policy: a Hugging Face folder (or hub id).
        device: where the weights go.
        dtype: of the weights.

    Raises:
        UserError: if the model's attention cannot be replaced by ours, or weights are missing.
    """
    config = AutoConfig.from_pretrained(policy)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    reason = None
    if not getattr(model_class, "_supports_attention_backend", False):
        reason = "its layers do not go through transformers' attention interface"
    elif rope_types(config.get_text_config()) & {"dynamic", "longrope"}:
        reason = "its rotations depend on the length of the longest sequence in the batch"
    elif "chunked_attention" in (getattr(config.get_text_config(), "layer_types", None) or ()):
        reason = "it has layers with chunked attention"
    if reason:
        raise UserError(
            f"the sampler does not support {config.model_type} ({policy}): {reason}; "
            "choose a decoder-only model such as Llama, Qwen, Mistral or Gemma"
        )
    module = load_whole(
        AutoModelForCausalLM, policy, dtype=dtype, attn_implementation=ATTENTION_NAME
    )
    return module.to(device).eval()


def rope_types(config: PretrainedConfig) -> set[str]:
    """Returns the kinds of rotation of a model's layers."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return {kind["rope_type"] for kind in kinds if "rope_type" in kind}


@torch.no_grad()
def update_weights(module: nn.Module, named: Iterable[tuple[str, Tensor]]) -> None:
    """Copies live weights into the module in place (same storage, so captured graphs stay valid).

    Args:
        module: the sampler's module.
        named: every parameter by name, any float dtype; tied ones may be left out.

    Raises:
        ValueError: if a name is unknown, a shape differs or a parameter is missing.
    """
    own = dict(module.named_parameters())
    missing = set(own)
    for name, tensor in named:
        if name not in own:
            if getattr(module.config, "tie_word_embeddings", False) and name == "lm_head.weight":
                continue
            raise ValueError(f"the sampler's module has no parameter {name}")
        if own[name].shape != tensor.shape:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}, not {tuple(own[name].shape)}")
        own[name].copy_(tensor)
        missing.discard(name)
    if missing:
        raise ValueError(f"no new weights for {', '.join(sorted(missing))}")


@torch.no_grad()
def checksum(named: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> str:
    """Returns a hash over all weights as they are in dtype; equal only for the same weights.

    Args:
        named: (name, tensor) pairs, in any order.
        dtype: that the sampler holds its weights in.
    """
    digests = []
    for name, tensor in named:
        raw = tensor.detach().to("cpu", dtype).contiguous().view(torch.uint8).numpy()
        digests.append(f"{name}:{hashlib.blake2b(raw, digest_size=16).hexdigest()}")
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()
