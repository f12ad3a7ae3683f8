"""Policy folder or live weights -> the sampler's module, with a checksum that tells stale weights."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from restem_lightning.errors import UserError
from restem_lightning.sampler.attention import ATTENTION_NAME


def load_module(policy: str | Path, *, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Returns the policy's causal language model in eval mode behind our attention.

    Args:
        policy: a Hugging Face folder (or hub id).
        device: where the weights go.
        dtype: of the weights.

    Raises:
        UserError: if the model's attention cannot be replaced by ours.
    """
    module = AutoModelForCausalLM.from_pretrained(
        policy, dtype=dtype, attn_implementation=ATTENTION_NAME
    )
    if module.config.is_encoder_decoder or getattr(module.config, "num_attention_heads", 0) == 0:
        raise UserError(
            f"the sampler runs decoder-only attention models, not {module.config.model_type} ({policy})"
        )
    return module.to(device).eval()


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
