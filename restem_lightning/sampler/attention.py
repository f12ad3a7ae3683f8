"""Our attention behind transformers' attention interface, for modules that run as they are.

Shape legend: T rows, H query heads, K key heads, D head size.
"""

from types import ModuleType

from restem_kernels.work import Work
from torch import Tensor, nn
from transformers import AttentionInterface

from restem_lightning.errors import UserError
from restem_lightning.sampler.kv_cache import KVCache

ATTENTION_NAME = "restem_blocks"


class AttentionState:
    """What the attention of one forward pass reads and writes; made once, used in every layer."""

    def __init__(self, ops: ModuleType, work: Work, cache: KVCache):
        """Makes the work ready for the layers.

        Args:
            ops: `restem_kernels.cpu`, `cpu_compiled` or `gpu`.
            work: of this pass.
            cache: keys and values.
        """
        self.ops, self.cache = ops, cache
        self.ready = ops.prepare(work, cache.keys[0])
        self.num_calls = 0  # attention layers passed so far: has the module really used this one?


def block_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    attention_state: AttentionState | None = None,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    dropout: float = 0.0,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention over the block cache, in the signature that transformers calls.

    Args:
        module: the attention layer; its `layer_idx` names the layer of the cache.
        query: [1, H, T, D].
        key: [1, K, T, D], written to the cache first.
        value: [1, K, T, D].
        attention_mask: None; the work list says what each row sees.
        attention_state: of this forward pass; None if the model does not pass it on.
        scaling: factor of the scores.
        sliding_window: positions a row can see, its own included; None for all.
        softcap: bound of the scores.
        s_aux: attention sinks, refused.
        dropout: 0 outside training.

    Returns:
        [1, T, H, D] and None for the attention weights.

    Raises:
        UserError: if the layer needs what this attention does not have.
    """
    assert attention_mask is None
    assert dropout == 0.0
    name = type(module).__name__
    if attention_state is None:
        raise UserError(f"the sampler does not support {name}: it drops attention_state on its way")
    if s_aux is not None:
        raise UserError(f"the sampler does not support {name}: it has attention sinks")
    state, cached = attention_state, attention_state.cache.head_shape
    for tensor in (key, value):
        if (tensor.shape[1], tensor.shape[3]) != cached:
            raise UserError(
                f"the sampler does not support {name}: its keys or values have (heads, size) "
                f"{(tensor.shape[1], tensor.shape[3])} where the config says {cached}"
            )
    state.num_calls += 1
    caches = state.cache.keys[module.layer_idx], state.cache.values[module.layer_idx]
    keys, values = key[0].transpose(0, 1), value[0].transpose(0, 1)
    state.ops.write_kv(keys, values, *caches, state.ready)
    mixed = state.ops.block_attention(
        query[0].transpose(0, 1),
        *caches,
        state.ready,
        scaling=scaling,
        window=sliding_window,
        softcap=softcap,
    )
    return mixed.unsqueeze(0), None


# No mask function is registered under this name, so transformers makes no mask.
AttentionInterface.register(ATTENTION_NAME, block_attention)
