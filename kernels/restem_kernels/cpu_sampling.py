"""Drawing the next token: temperature, top-k, top-p, min-p, an addressed draw, two log-probs.

Meets `reference.sample_tokens`, which defines it. With top-k, random numbers are made for a few
dozen candidates of each row alone; there is no sort of the vocabulary and no multinomial.

Shape legend: B rows (one sequence each), V vocabulary, C candidates.
"""

import torch
from torch import Tensor

from restem_kernels import reference

# Candidates beyond the k-th, for logits that tie with it; in bfloat16 many rows have some.
SPARE = 64
_ROWS = 32  # of the log-softmax over the vocabulary, at a time


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
    """Returns what `reference.sample_tokens` returns; a row's result depends on that row alone."""
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    num_tokens = logits.shape[-1]
    if temperature == 0.0:
        return reference.sample_tokens(logits, key, completion_index, position, **settings)
    if not 0 < top_k < num_tokens - SPARE:
        scores = reference.process_logits(logits, **settings)
        noise = _noise_of_all(key, completion_index, position, num_tokens)
        return _draw(logits, scores, noise, None)
    values, token_ids = logits.topk(top_k + SPARE, dim=-1)
    scores = reference.process_logits(values, **settings)
    noise = reference.gumbel_noise(key, completion_index, position, token_ids)
    drawn = _draw(logits, scores, noise, token_ids)
    scaled = values.float() / temperature
    unsure = (scaled[:, -1] == scaled[:, top_k - 1]) & scaled[:, -1].isfinite()
    if bool(unsure.any()):  # more ties than spare candidates
        rows = unsure.nonzero().squeeze(-1)
        again = (tensor[rows] for tensor in (logits, key, completion_index, position))
        for target, part in zip(drawn, reference.sample_tokens(*again, **settings), strict=True):
            target[rows] = part
    return drawn


def _noise_of_all(
    key: Tensor, completion_index: Tensor, position: Tensor, num_tokens: int
) -> Tensor:
    """Returns `reference.gumbel_noise` [B, V] of every token, each word made once."""
    groups = torch.arange((num_tokens + 3) // 4, device=key.device).expand(key.shape[0], -1)
    words = reference.philox(
        key[:, None, :],
        (groups, position[:, None], completion_index[:, None], torch.zeros_like(groups)),
    )
    return reference.to_gumbel(torch.stack(words, -1).flatten(1)[:, :num_tokens])


def _draw(
    logits: Tensor, scores: Tensor, noise: Tensor, token_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the tokens with the largest sum of score and noise, and their two log-probabilities.

    Args:
        logits: [B, V] any float dtype.
        scores: [B, C] float32, -inf where nothing may be drawn.
        noise: [B, C] float32.
        token_ids: [B, C] int64, None where the candidates are the whole vocabulary.
    """
    best = (scores + noise).argmax(-1, keepdim=True)
    tokens = best if token_ids is None else token_ids.gather(-1, best)
    # Not logsumexp: for a single row it would add in another order. A few rows at a time stay in
    # the processor's cache.
    logprobs = torch.cat(
        [
            part.log_softmax(-1, dtype=torch.float32).gather(-1, chosen)
            for part, chosen in zip(logits.split(_ROWS), tokens.split(_ROWS), strict=True)
        ]
    )
    drawn_from = scores.log_softmax(-1).gather(-1, best)
    return tokens.squeeze(-1), logprobs.squeeze(-1), drawn_from.squeeze(-1)
