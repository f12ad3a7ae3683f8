"""Every public function of this package in plain torch: the definition that the kernels must meet.

Shape legend: B rows (one sequence each), V vocabulary.
"""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85


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


def to_gumbel(bits: Tensor) -> Tensor:
    """Returns standard Gumbel noise, float32, made of words with values in [0, 2**32)."""
    # The winner lies where the uniform is near 0, where float32 is dense: hence log1p(-u).
    uniform = (bits.to(torch.float32) * 2.0**-32 + 2.0**-33).clamp_max(1.0 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform))


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
