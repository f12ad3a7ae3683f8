"""Every public function of this package in plain torch: the definition that the kernels must meet.

Shape legend: B rows (one sequence each), V vocabulary, T rows of a forward pass, E hidden size,
I intermediate size, H query heads, K key heads, D head size, n cache blocks, S tokens in a block,
P positions.
"""

import math

import torch
from torch import Tensor

from restem_kernels.work import (
    FIRST_KEY,
    FIRST_MEMBER,
    LAST_KEY,
    NUM_MEMBERS,
    PIECE,
    START,
    TABLE,
    Work,
)

_MASK = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_SQRT_HALF = 0x3F3504F3  # the bits of sqrt(0.5) in float32


def _mul_hi_lo(multiplier: int, values: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the high and low 32 bits of multiplier * values; int64 wraps, so no bit is lost."""
    product = values * multiplier
    return (product >> 32) & _MASK, product & _MASK


def philox(key: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Returns the four 32-bit words of Philox-4x32-10 for each key and counter.

    Args:
        key: [..., 2] int64, each a value in [0, 2**32).
        counter: four int64 tensors with values in [0, 2**32), broadcastable against key[..., 0].

    Returns:
        Four int64 tensors with values in [0, 2**32).

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key[..., 0], key[..., 1]
    for _ in range(10):
        high_a, low_a = _mul_hi_lo(_ROUND_A, c0)
        high_b, low_b = _mul_hi_lo(_ROUND_B, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + _KEY_A) & _MASK, (k1 + _KEY_B) & _MASK
    return c0, c1, c2, c3


def _log(exponent: Tensor, fraction: Tensor) -> Tensor:
    """Returns log(2**exponent * (1 + fraction)), for fraction in [sqrt(0.5) - 1, sqrt(2) - 1].

    log(1 + f) = 2 atanh(f / (2 + f)); the terms of the series left out come to 3e-8.
    """
    s = fraction / (fraction + 2.0)
    z = s * s
    series = 1.0 + z * (1 / 3 + z * (1 / 5 + z * (1 / 7)))
    return exponent * math.log(2.0) + (s + s) * series


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns exponent and fraction of a float32 for `_log`, both float32."""
    bits = x.view(torch.int32)
    exponent = (bits - _SQRT_HALF) >> 23
    return exponent.float(), (bits - (exponent << 23)).view(torch.float32) - 1.0


def to_gumbel(bits: Tensor) -> Tensor:
    """Returns standard Gumbel noise, float32, made of words with values in [0, 2**32).

    Written with IEEE additions, products and quotients alone, each rounded to float32 (no fused
    multiply-add), because logarithms differ in their last bits between libraries and devices: so
    the same words give the same noise, bit by bit, wherever it is computed. It lies within 4e-7,
    relative where above 1, of -log(-log(1 - u)).
    """
    # The winner lies where the uniform is near 0, where float32 is dense: hence log(1 - u), and
    # -u itself for the fraction of a 1 - u that is near 1.
    uniform = (bits.to(torch.float32) * 2.0**-32 + 2.0**-33).clamp_max(1.0 - 2.0**-24)
    exponent, fraction = _split(1.0 - uniform)
    exponential = -_log(exponent, torch.where(exponent == 0, -uniform, fraction))
    return -_log(*_split(exponential))


def gumbel_noise(
    key: Tensor, completion_index: Tensor, position: Tensor, token_ids: Tensor
) -> Tensor:
    """Returns the standard Gumbel noise that belongs to each address and token.

    The counter is (token // 4, position, completion index, 0) and the token takes word token % 4:
    the noise of a token depends on its address alone.

    Args:
        key: [B, 2] int64, words of 32 bits; one key per (seed, iteration, problem).
        completion_index: [B] int64, index of the completion within its problem.
        position: [B] int64, index of the drawn token within its completion.
        token_ids: [B, n] int64.

    Returns:
        [B, n] float32.
    """
    words = philox(
        key[:, None, :],
        (token_ids >> 2, position[:, None], completion_index[:, None], torch.zeros_like(token_ids)),
    )
    bits = torch.stack(words, -1).gather(-1, (token_ids & 3).unsqueeze(-1)).squeeze(-1)
    return to_gumbel(bits)


def process_logits(
    logits: Tensor, *, temperature: float, top_k: int, top_p: float, min_p: float
) -> Tensor:
    """Returns logits as float32 after temperature, top-k, top-p and min-p, in this order.

    Excluded tokens are -inf. Ties with the k-th largest logit are all kept, so the result does not
    depend on the order of equal values; so are ties with the last token that top-p keeps.

    Args:
        logits: [B, V] any float dtype; -inf marks forbidden tokens.
        temperature: above 0.
        top_k: tokens kept, 0 for all; more than V means all.
        top_p: probability mass kept, in (0, 1].
        min_p: least probability relative to the likeliest token, in [0, 1).

    Source: the order and the rules of the logits processors of Hugging Face transformers.
    """
    scores = logits.float() / temperature
    if 0 < top_k < scores.shape[-1]:
        threshold = scores.topk(top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < threshold, float("-inf"))
    if top_p < 1.0:
        ordered = scores.sort(dim=-1, descending=True).values
        mass_before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        last = (mass_before < top_p).sum(-1, keepdim=True).clamp_min(1) - 1
        scores = scores.masked_fill(scores < ordered.gather(-1, last), float("-inf"))
    if min_p > 0.0:
        log_probs = scores.log_softmax(-1)
        least = log_probs.amax(-1, keepdim=True) + torch.log(torch.tensor(min_p))
        scores = scores.masked_fill(log_probs < least, float("-inf"))
    return scores


def sample_tokens(
    logits: Tensor,
    key: Tensor,
    completion_index: Tensor,
    position: Tensor,
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws one token per row by the Gumbel-max rule with addressed noise.

    Args:
        logits: [B, V] any float dtype.
        key: [B, 2] int64, see `gumbel_noise`.
        completion_index: [B] int64.
        position: [B] int64.
        temperature: 0 takes the likeliest token, the lowest id among equals.
        top_k: see `process_logits`.
        top_p: see `process_logits`.
        min_p: see `process_logits`.

    Returns:
        tokens [B] int64, their log-probability [B] float32 under softmax(logits) (T=1, nothing
        excluded), and their log-probability [B] float32 under the distribution drawn from.
    """
    raw = logits.float().log_softmax(-1)
    if temperature == 0.0:
        tokens = logits.float().argmax(-1)
        logprobs = raw.gather(-1, tokens[:, None]).squeeze(-1)
        return tokens, logprobs, torch.zeros_like(logprobs)
    scores = process_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    everything = torch.arange(logits.shape[-1], device=logits.device).expand_as(scores)
    noise = gumbel_noise(key, completion_index, position, everything)
    tokens = (scores + noise).argmax(-1)
    logprobs = raw.gather(-1, tokens[:, None]).squeeze(-1)
    processed = scores.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
    return tokens, logprobs, processed


def add_rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the normalized sum of x and residual, and the sum itself.

    The sum is rounded to the dtype of x before it is normalized in float32, and the normalized
    value is rounded before it is multiplied by the weight, as the Llama modules of Hugging Face
    transformers do.

    Args:
        x: [T, E] any float dtype.
        weight: [E], of the same dtype.
        eps: added to the mean square.
        residual: [T, E], of the same dtype; None for zero.

    Returns:
        [T, E] and [T, E], of the dtype of x.
    """
    total = x if residual is None else x + residual
    wide = total.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype), total


def gated_silu(gate_up: Tensor) -> Tensor:
    """Returns silu(gate) * up [T, I] for gate and up side by side in [T, 2 I].

    silu(gate) is rounded to the dtype before the product, as with two operations.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def write_kv(keys: Tensor, values: Tensor, key_cache: Tensor, value_cache: Tensor, work: Work):
    """Writes the key and value of each row to its place in the cache.

    Row r goes to block tables[own_tables[r], i // S], offset i % S, where i = positions[r] -
    own_starts[r]. Rows that share a place (unused rows do) leave the value of any one of them.

    Args:
        keys: [T, K, D].
        values: [T, K, D].
        key_cache: [n, K, S, D], changed in place.
        value_cache: [n, K, S, D], changed in place.
        work: where each row goes.
    """
    size = key_cache.shape[2]
    index = (work.positions - work.own_starts).long()
    blocks = work.tables[work.own_tables.long(), index // size].long()
    key_cache[blocks, :, index % size] = keys
    value_cache[blocks, :, index % size] = values


def rotate_and_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    work: Work,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Returns the rotated queries [T, H, D]; writes the rotated keys and the values to the cache.

    Args:
        qkv: [T, (H + 2 K) * D], queries, keys and values of each row side by side.
        cos: [P, D], row p belongs to position p; its two halves are equal.
        sin: [P, D].
        key_cache: [n, K, S, D], changed in place.
        value_cache: [n, K, S, D], changed in place.
        work: the position of each row, and where its key and value go, see `write_kv`.
        q_norm: [D], weight of an RMSNorm of each query head before it is rotated, None for none.
        k_norm: [D], the same for key heads.
        eps: of these norms.

    Source: the rotation by halves of the Llama modules of Hugging Face transformers, products and
    sum rounded to the dtype one after the other.
    """
    num_key_heads, size = key_cache.shape[1], key_cache.shape[3]
    heads = qkv.unflatten(-1, (-1, size))
    queries, keys, values = heads.split(
        [heads.shape[1] - 2 * num_key_heads, num_key_heads, num_key_heads], dim=1
    )
    positions = work.positions.long()
    cos, sin = cos[positions][:, None], sin[positions][:, None]

    def rotate(x: Tensor, norm: Tensor | None) -> Tensor:
        if norm is not None:
            x = add_rms_norm(x, norm, eps=eps)[0]
        low, high = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-high, low), -1) * sin

    write_kv(rotate(keys, k_norm), values, key_cache, value_cache, work)
    return rotate(queries, q_norm)


def block_attention(
    queries: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    work: Work,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Returns the attention [T, H, D] of each row over the keys that it sees.

    Each piece is a softmax over its own keys, with the log-sum-exp of its scores in float32; the
    pieces of a row are averaged with weights softmax(log-sum-exp). A row that sees no key is zero.

    Args:
        queries: [T, H, D].
        key_cache: [n, K, S, D]; query head h goes with key head h // (H // K).
        value_cache: [n, K, S, D].
        work: what each row attends to.
        scaling: factor of the scores.
        window: positions that a row sees, its own included; None for all before it.
        softcap: c of c * tanh(score / c) (Gemma 2), None for none.
    """
    num_rows, num_heads, head_size = queries.shape
    group, size = num_heads // key_cache.shape[1], key_cache.shape[2]
    mixed = torch.zeros(num_rows, work.num_pieces, num_heads, head_size, device=queries.device)
    normalizers = torch.full(mixed.shape[:3], float("-inf"), device=queries.device)

    def attend(rows: list[int], table: int, start: int, first: int, last: int, piece: list[int]):
        index = torch.arange(first, last, device=queries.device)
        blocks = work.tables[table].long()[index // size]
        keys = key_cache[blocks, :, index % size].float().repeat_interleave(group, 1)  # [L, H, D]
        values = value_cache[blocks, :, index % size].float().repeat_interleave(group, 1)
        scores = torch.einsum("mhd,lhd->mhl", queries[rows].float(), keys) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        behind = work.positions[rows].long()[:, None] - (start + index)  # [m, L]
        visible = behind >= 0 if window is None else (behind >= 0) & (behind < window)
        scores = scores.masked_fill(~visible[:, None], float("-inf"))
        normalizer = scores.logsumexp(-1)
        weights = (scores - normalizer[..., None]).exp().nan_to_num(0.0)
        mixed[rows, piece] = torch.einsum("mhl,lhd->mhd", weights, values)
        normalizers[rows, piece] = normalizer

    for tile in work.tiles[: int(work.num_tiles)].tolist():
        first = tile[FIRST_MEMBER]
        rows = work.members[first : first + tile[NUM_MEMBERS]].tolist()
        pieces = [tile[PIECE]] * len(rows)
        attend(rows, tile[TABLE], tile[START], tile[FIRST_KEY], tile[LAST_KEY], pieces)
    for row in range(num_rows) if work.attend_own else ():
        start, table = int(work.own_starts[row]), int(work.own_tables[row])
        num_keys = int(work.positions[row]) - start + 1
        for number, first in enumerate(range(0, num_keys, work.split)):
            piece = [int(work.num_shared[row]) + number]
            attend([row], table, start, first, min(first + work.split, num_keys), piece)
    highest = normalizers.amax(1, keepdim=True).clamp_min(-1e30)
    weights = (normalizers - highest).exp()
    weights = weights / weights.sum(1, keepdim=True).clamp_min(1e-30)
    return (weights[..., None] * mixed).sum(1).to(queries.dtype)
