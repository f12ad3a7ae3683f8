"""Attention of packed sequences behind transformers' attention interface.

A segment (see packing.py) attends to what comes before it and, causally, to itself: queries and
keys end at the same token, which is what flash-attn's varlen kernel computes, and what a triangle
at the lower right of a mask says.

Shape legend: T tokens, H query heads, K key heads, D head size, Q and P tokens and keys of one
segment.
"""

import functools
import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig

from restem_lightning.errors import UserError
from restem_lightning.m_step.packing import Segments

ATTENTION_NAME = "restem_packed"


class PackedAttention:
    """What the attention of one forward pass needs to know; made once, used in every layer."""

    def __init__(self, segments: Segments):
        """Holds the segments of a micro-batch and the masks that their layers share."""
        self.segments = segments
        self._masks: dict[tuple[int, int, int | None], Tensor] = {}

    def mask(self, num_queries: int, num_keys: int, window: int | None, device: torch.device):
        """Returns bool [Q, P], true where a query sees a key."""
        shape = (num_queries, num_keys, window)
        if shape not in self._masks:
            self._masks[shape] = _mask(*shape, device)
        return self._masks[shape]


def check_attention(config: PretrainedConfig, model_class: type) -> None:
    """Checks that a family's attention can be replaced by this one.

    Raises:
        UserError: it cannot.
    """
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ())
    reason = None
    if not getattr(model_class, "_supports_attention_backend", False):
        reason = "its layers do not go through transformers' attention interface"
    elif unknown := kinds - {"full_attention", "sliding_attention"}:
        reason = f"it has layers of the kind {', '.join(sorted(unknown))}"
    if reason:
        raise UserError(
            f"the M-step does not support {model_class.__name__}: {reason}; choose a decoder-only"
            " model such as Llama, Qwen, Mistral or Gemma"
        )


@torch.compiler.disable  # segments differ in each micro-batch
def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: PackedAttention | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    dropout: float = 0.0,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention within sequences, in the signature that transformers calls.

    Args:
        module: the attention layer.
        query: [B, H, T, D]; B is 1 for a micro-batch.
        key: [B, K, T, D].
        value: [B, K, T, D].
        attention_mask: None; the segments say what each token sees.
        packed: of this micro-batch; None if each row is one sequence.
        scaling: factor of the scores; None for 1 / sqrt(D).
        sliding_window: positions that a token can see, its own included; None for all.
        softcap: bound of the scores.
        s_aux: attention sinks, refused.
        dropout: 0: dropout is off in the M-step.

    Returns:
        [B, T, H, D] and None for the attention weights.

    Raises:
        UserError: if the layer needs what this attention does not have.
    """
    assert attention_mask is None
    assert dropout == 0.0
    if s_aux is not None:
        raise UserError(
            f"the M-step does not support {type(module).__name__}: it has attention sinks"
        )
    if packed is None:
        size = query.shape[2]
        mask = _mask(size, size, sliding_window, query.device)
        return _attend(query, key, value, mask, scaling, softcap).transpose(1, 2), None
    segments = packed.segments
    if segments.key_index is not None:
        key, value = (each.index_select(2, segments.key_index) for each in (key, value))
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type):
        # Rotated queries and keys are float32 then, values are not. After index_select, so that the
        # gradients of shared keys are summed up in float32.
        dtype = torch.get_autocast_dtype(device_type)
        query, key, value = (each.to(dtype) for each in (query, key, value))
    kernel = _varlen_kernel(device_type, query.dtype, softcap is not None)
    if kernel is not None:
        rows = (each[0].transpose(0, 1) for each in (query, key, value))
        return kernel(*rows, segments, scaling, sliding_window, softcap)[None], None
    pieces = zip(
        query.split(segments.query_lengths, dim=2),
        key.split(segments.key_lengths, dim=2),
        value.split(segments.key_lengths, dim=2),
        strict=True,
    )
    mixed = [
        _attend(q, k, v, packed.mask(q.shape[2], k.shape[2], sliding_window, q.device), scaling,
                softcap)
        for q, k, v in pieces
    ]  # fmt: skip
    return torch.cat(mixed, dim=2).transpose(1, 2), None


def _mask(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    ones = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    before = num_keys - num_queries
    seen = ones.tril(before)
    return seen if window is None else seen & ones.triu(before - window + 1)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """Attention of one segment: [B, H, Q, D]."""
    if softcap is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * (scaling / softcap))
    weights = scores.float().masked_fill(~mask, -torch.inf).softmax(-1)
    return weights.to(value.dtype) @ value


Kernel = Callable[
    [Tensor, Tensor, Tensor, Segments, float | None, int | None, float | None], Tensor
]


@functools.cache
def _varlen_kernel(device_type: str, dtype: torch.dtype, softcap: bool) -> Kernel | None:
    """Returns the kernel that takes all segments at once, if there is one here.

    flash-attn where it is installed, else torch's own, which cannot cap scores.
    """
    if device_type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None if softcap else _torch_varlen()

    def flash(query, key, value, segments, scaling, window, cap):
        return flash_attn_varlen_func(
            query,
            key,
            value,
            segments.query_ends,
            segments.key_ends,
            max(segments.query_lengths),
            max(segments.key_lengths),
            softmax_scale=scaling,
            causal=True,
            window_size=(-1 if window is None else window - 1, 0),
            softcap=cap or 0.0,
        )

    return flash


def _torch_varlen() -> Kernel | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    parameters = inspect.signature(varlen_attn).parameters
    if not {"window_size", "scale"} <= set(parameters):  # torch 2.10
        return None
    # torch 2.11 takes grouped heads as they come, later versions want to be told.
    grouped = {"enable_gqa": True} if "enable_gqa" in parameters else {}

    def varlen(query, key, value, segments, scaling, window, _):
        return varlen_attn(
            query,
            key,
            value,
            segments.query_ends,
            segments.key_ends,
            max(segments.query_lengths),
            max(segments.key_lengths),
            scale=scaling,
            window_size=(-1 if window is None else window - 1, 0),
            **grouped,
        )

    return varlen


# No mask function is registered under this name, so transformers makes no mask.
AttentionInterface.register(ATTENTION_NAME, packed_attention)
