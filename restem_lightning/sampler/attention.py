"""Our attention behind transformers' attention interface: shared keys once, private ones each.

A row attends to several pieces of keys: the preamble that all prompts share, the rest of its
prompt, and the blocks of its own tokens. Each piece gives a partial result, the weighted values and
the log-sum-exp of the scores; a row's partial results are merged at the end. Shared pieces are
matrix-matrix products over all rows that share them. The products have the same shape whatever else
is in the batch.

Shape legend: T rows, H query heads, K key heads, G = H // K, D head size, L keys, g tiles, m rows
of a tile, P the most pieces of any row.
"""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from restem_lightning.errors import UserError
from restem_lightning.sampler.batch import Batch, Tiles
from restem_lightning.sampler.kv_cache import KVCache

ATTENTION_NAME = "restem_blocks"
_LOWEST = -1e30  # stands for -inf, with no NaN in differences


class AttentionState:
    """What the attention of one forward pass reads and writes; made once, used in every layer."""

    def __init__(self, batch: Batch, cache: KVCache):
        """Prepares the places in the cache.

        Args:
            batch: the rows and the work on them.
            cache: keys and values.
        """
        self.batch, self.cache = batch, cache
        self.num_calls = 0  # attention layers passed so far: has the module really used this one?
        self.masks: dict[tuple[int, int | None], Tensor] = {}  # of each tile set and window
        blocks = cache.per_head(batch.write_blocks[:, None]).squeeze(-1)
        self.slots = (blocks * cache.block_size + batch.write_offsets[:, None]).flatten()
        self.blocks = [
            tiles.blocks if isinstance(tiles.blocks, slice) else cache.per_head(tiles.blocks)
            for tiles in batch.tiles
        ]
        self.pieces = batch.pieces.flatten()


def _mask(tiles: Tiles, positions: Tensor, length: int, window: int | None) -> Tensor:
    """Returns [g, m, L] float32: 0 for keys that a row sees, else the lowest score.

    A row sees the first num_keys keys and, with a window, none that lies too far behind it.
    """
    index = torch.arange(length, device=positions.device)
    visible = index < tiles.num_keys[..., None]
    if window is not None:
        rows = tiles.rows.clamp_max(len(positions) - 1)
        oldest = positions[rows] - (window - 1) - tiles.first_position[:, None]
        visible &= index >= oldest[..., None]
    return torch.zeros(visible.shape, device=index.device).masked_fill_(~visible, _LOWEST)


def _attend(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float, softcap
) -> tuple[Tensor, Tensor]:
    """Returns the weighted values [g, K, M, D] and the log-sum-exp of the scores [g, K, M] float32.

    Args:
        queries: [g, K, M, D], M rows and heads that share a key head.
        keys: [g, K, L, D].
        values: [g, K, L, D].
        mask: [g, 1, M, L], added to the scores.
        scaling: factor of the scores.
        softcap: bound of the scores (Gemma 2), None for no bound.
    """
    if softcap is None and queries.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries, keys, values, attn_mask=mask, scale=scaling
        )
    scores = (queries @ keys.transpose(-1, -2)).float() * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores += mask
    normalizer = scores.logsumexp(-1)
    weights = (scores - normalizer[..., None]).exp().to(values.dtype)
    return weights @ values, normalizer


def _attend_tiles(
    state: AttentionState, index: int, layer: int, queries: Tensor, scaling, softcap, window
) -> tuple[Tensor, Tensor]:
    """Returns weighted values [g * m, H, D] and log-sum-exps [g * m, H] of one set of tiles.

    Args:
        state: of this forward pass.
        index: which of the batch's sets of tiles.
        layer: of the cache.
        queries: [T + 1, H, D].
        scaling: see `_attend`.
        softcap: see `_attend`.
        window: keys a row can see, None for all.
    """
    tiles = state.batch.tiles[index]
    g, m = tiles.rows.shape
    _, num_heads, size = queries.shape
    num_key_heads = state.cache.head_shape[0]
    group = num_heads // num_key_heads
    blocks = state.blocks[index]
    if isinstance(blocks, slice):
        keys, values = state.cache.keys[layer][blocks], state.cache.values[layer][blocks]
    else:
        keys, values = state.cache.gather(layer, blocks)
    mask = state.masks.get((index, window))
    if mask is None:
        mask = _mask(tiles, state.batch.positions, keys.shape[2], window).to(queries.dtype)
        mask = mask.repeat_interleave(group, dim=1)[:, None]
        state.masks[index, window] = mask
    chosen = (
        queries.index_select(0, tiles.rows.flatten())
        .view(g, m, num_key_heads, group, size)
        .transpose(1, 2)
    )
    mixed, normalizers = _attend(
        chosen.reshape(g, num_key_heads, m * group, size), keys, values, mask, scaling, softcap
    )
    return (
        mixed.view(g, num_key_heads, m, group, size).transpose(1, 2).reshape(-1, num_heads, size),
        normalizers.view(g, num_key_heads, m, group).transpose(1, 2).reshape(-1, num_heads),
    )


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
        attention_mask: None; the batch says what each row sees.
        attention_state: of this forward pass; None if the model does not pass it on.
        scaling: factor of the scores.
        sliding_window: keys a row can see, itself included; None for all.
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
    cached = attention_state.cache.head_shape
    for tensor in (key, value):
        if (tensor.shape[1], tensor.shape[3]) != cached:
            raise UserError(
                f"the sampler does not support {name}: its keys or values have (heads, size) "
                f"{(tensor.shape[1], tensor.shape[3])} where the config says {cached}"
            )
    state, batch, layer = attention_state, attention_state.batch, module.layer_idx
    state.num_calls += 1
    keys, values = key[0].transpose(0, 1), value[0].transpose(0, 1)
    used = len(batch.write_blocks)
    state.cache.write(layer, state.slots, keys[:used], values[:used])
    # One more row than there are: the unused places of tiles point to it.
    queries = nn.functional.pad(query[0].transpose(0, 1), (0, 0, 0, 0, 0, 1))
    pieces = [
        _attend_tiles(state, index, layer, queries, scaling, softcap, sliding_window)
        for index in range(len(batch.tiles))
    ]
    nothing = queries[:1]
    lowest = torch.full(nothing.shape[:2], _LOWEST, device=queries.device)
    mixed, normalizers = (
        torch.cat([*parts, unused]).index_select(0, state.pieces).unflatten(0, batch.pieces.shape)
        for parts, unused in zip(zip(*pieces, strict=True), (nothing, lowest), strict=True)
    )
    weights = (normalizers - normalizers.amax(1, keepdim=True)).exp_()  # [T, P, H]
    weights /= weights.sum(1, keepdim=True)
    merged = (weights[..., None] * mixed).sum(1)
    return merged.to(query.dtype).unsqueeze(0), None


# No mask function is registered under this name, so transformers makes no mask.
AttentionInterface.register(ATTENTION_NAME, block_attention)
