"""Our attention behind transformers' attention interface: shared segments once, private blocks each.

Every row attends to up to three sets of keys: the preamble that all prompts share, the rest of its
prompt, and its own tokens. Each gives a partial softmax (largest score, sum of weights, weighted
values); the partial results are merged at the end. Shared sets are matrix-matrix products over all
rows that share them. The products have the same shape whatever else is in the batch.

Shape legend: T rows, H query heads, K key heads, G = H // K, D head size, L keys, g tiles, m rows
of a tile, W private blocks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from restem_lightning.sampler.batch import NUM_LEVELS, Batch
from restem_lightning.sampler.kv_cache import KVCache

ATTENTION_NAME = "restem_blocks"
_LOWEST = -1e30  # stands for -inf, with no NaN in differences


@dataclass(kw_only=True)
class AttentionState:
    """What the attention of one forward pass reads and writes.

    Args:
        batch: the rows and the work on them.
        cache: keys and values.
        num_calls: attention layers passed so far; tells whether the module really used this one.
        partial: largest score [levels, T + 1, H], sum of weights [levels, T + 1, H] and weighted
            values [levels, T + 1, H, D], all float32; the last row takes what is not used.
    """

    batch: Batch
    cache: KVCache
    num_calls: int = 0
    partial: tuple[Tensor, Tensor, Tensor] | None = None


def _partial_softmax(
    queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scaling: float, softcap
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns largest score [g, m, H], sum of weights [g, m, H] and weighted values [g, m, H, D].

    Args:
        queries: [g, m, H, D].
        keys: [g, K, L, D].
        values: [g, K, L, D].
        visible: [g, m, L] bool.
        scaling: factor of the scores.
        softcap: bound of the scores (Gemma 2), None for no bound.
    """
    g, m, num_heads, size = queries.shape
    num_key_heads = keys.shape[1]
    group = num_heads // num_key_heads
    tiles = queries.view(g, m, num_key_heads, group, size).transpose(1, 2)
    tiles = tiles.reshape(g, num_key_heads, m * group, size)
    scores = (tiles @ keys.transpose(-1, -2)).float() * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.view(g, num_key_heads, m, group, -1)
    scores = scores.masked_fill_(~visible[:, None, :, None, :], float("-inf"))
    largest = scores.amax(-1, keepdim=True).clamp_min(_LOWEST)
    weights = scores.sub_(largest).exp_()
    total = weights.sum(-1)
    weights = weights.view(g, num_key_heads, m * group, -1).to(values.dtype)
    mixed = (weights @ values).float().view(g, num_key_heads, m, group, size)
    return (
        largest.squeeze(-1).transpose(1, 2).reshape(g, m, num_heads),
        total.transpose(1, 2).reshape(g, m, num_heads),
        mixed.transpose(1, 2).reshape(g, m, num_heads, size),
    )


def _visible(
    num_keys: Tensor, first_position: Tensor, positions: Tensor, length: int, window: int | None
) -> Tensor:
    """Returns [g, m, L] bool: keys below num_keys and, with a window, not too far behind the row."""
    index = torch.arange(length, device=num_keys.device)
    visible = index < num_keys[..., None]
    if window is not None:
        oldest = positions - (window - 1) - first_position[:, None]
        visible &= index >= oldest[..., None]
    return visible


def _shared_attention(state, layer, queries, scaling, softcap, window) -> None:
    largest, total, mixed = state.partial
    last = state.batch.num_rows
    for work in state.batch.shared:
        tiles, num_blocks = work.blocks.shape
        keys, values = (
            tensors[layer][work.blocks.flatten()]
            .unflatten(0, (tiles, num_blocks))
            .transpose(1, 2)
            .flatten(2, 3)
            for tensors in (state.cache.keys, state.cache.values)
        )
        rows = work.rows.clamp_max(last - 1)
        visible = _visible(
            work.num_keys, work.first_position, state.batch.positions[rows], keys.shape[2], window
        )
        parts = _partial_softmax(queries[rows], keys, values, visible, scaling, softcap)
        for target, part in zip((largest, total, mixed), parts, strict=True):
            target[work.level].index_copy_(0, work.rows.flatten(), part.flatten(0, 1))


def _private_attention(state, layer, queries, scaling, softcap, window) -> None:
    work = state.batch.private
    largest, total, mixed = state.partial
    rows = work.rows.clamp_max(state.batch.num_rows - 1)[:, None]
    keys, values = state.cache.keys[layer][work.blocks], state.cache.values[layer][work.blocks]
    visible = _visible(
        work.num_keys[:, None],
        work.first_position,
        state.batch.positions[rows],
        keys.shape[2],
        window,
    )
    parts = _partial_softmax(queries[rows], keys, values, visible, scaling, softcap)
    highs, sums, mixes = (part.squeeze(1) for part in parts)
    unused = highs.new_full((1, highs.shape[1]), _LOWEST)
    highs = torch.cat([highs, unused])[work.table]  # [rows, blocks of a row, H]
    sums = torch.cat([sums, torch.zeros_like(unused)])[work.table]
    mixes = torch.cat([mixes, mixes.new_zeros(1, *mixes.shape[1:])])[work.table]
    top = highs.amax(1)
    factors = (highs - top[:, None]).exp()
    level = NUM_LEVELS - 1
    largest[level].index_copy_(0, work.table_rows, top)
    total[level].index_copy_(0, work.table_rows, (factors * sums).sum(1))
    mixed[level].index_copy_(0, work.table_rows, (factors[..., None] * mixes).sum(1))


def block_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    attention_state: AttentionState,
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
        attention_state: of this forward pass.
        scaling: factor of the scores.
        sliding_window: keys a row can see, itself included; None for all.
        softcap: bound of the scores.
        s_aux: attention sinks, refused.
        dropout: 0 outside training.

    Returns:
        [1, T, H, D] and None for the attention weights.
    """
    assert attention_mask is None
    assert dropout == 0.0
    if s_aux is not None:
        raise NotImplementedError("attention sinks")
    state, batch, layer = attention_state, attention_state.batch, module.layer_idx
    state.num_calls += 1
    queries, keys, values = (t[0].transpose(0, 1) for t in (query, key, value))
    used = batch.write_blocks.shape[0]
    state.cache.write(layer, batch.write_blocks, batch.write_offsets, keys[:used], values[:used])
    rows, num_heads, size = queries.shape
    if state.partial is None:
        # The same rows are written in every layer, so one clean start serves the whole pass.
        shape = (NUM_LEVELS, rows + 1, num_heads)
        state.partial = (
            queries.new_full(shape, _LOWEST, dtype=torch.float32),
            queries.new_zeros(shape, dtype=torch.float32),
            queries.new_zeros((*shape, size), dtype=torch.float32),
        )
    _shared_attention(state, layer, queries, scaling, softcap, sliding_window)
    if batch.private is not None:
        _private_attention(state, layer, queries, scaling, softcap, sliding_window)
    largest, total, mixed = (part[:, :rows] for part in state.partial)
    factors = (largest - largest.amax(0)).exp()
    normalizer = (factors * total).sum(0).clamp_min(1e-30)  # 0 only in rows of padding
    merged = (factors[..., None] * mixed).sum(0) / normalizer[..., None]
    return merged.to(query.dtype).unsqueeze(0), None


# No mask function is registered under this name, so transformers makes no mask.
AttentionInterface.register(ATTENTION_NAME, block_attention)
