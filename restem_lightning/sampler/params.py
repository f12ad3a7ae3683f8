"""Sampling settings and the records that enter and leave the sampler."""

import hashlib
from dataclasses import dataclass

from restem_lightning.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    r"""How completions are drawn.

    Args:
        n: completions per problem, at least 1 (the paper: 32 for math, 64 for code).
        temperature: 0 is greedy, else logits are divided by it (the paper: 0.7).
        top_k: only the k likeliest tokens can be drawn, 0 for all (the paper: 40).
        top_p: only the likeliest tokens that make up this probability mass, in (0, 1]; 1 for all.
        min_p: only tokens at least this likely relative to the likeliest, in [0, 1).
        max_new_tokens: a completion of this many tokens is cut and counts as truncated.
        stop: strings that end a completion; the text is cut before them, and so are the tokens, but
            for one such as `)\n` that the last character of the text shares with a stop string.
    """

    n: int = 32
    temperature: float = 0.7
    top_k: int = 40
    top_p: float = 1.0
    min_p: float = 0.0
    max_new_tokens: int = 512
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Checks every value.

        Raises:
            UserError: naming the value, what is allowed and the remedy.
        """
        for name, least in (("n", 1), ("max_new_tokens", 1), ("top_k", 0), ("temperature", 0)):
            value = getattr(self, name)
            if not least <= value < 2**31:  # nor is it nan
                raise UserError(f"sampling.{name} ({value}) must be at least {least}, below 2**31")
        if not 0 < self.top_p <= 1:
            raise UserError(f"sampling.top_p ({self.top_p}) must be above 0 and at most 1")
        if not 0 <= self.min_p < 1:
            raise UserError(f"sampling.min_p ({self.min_p}) must be at least 0 and below 1")
        if "" in self.stop:
            raise UserError("sampling.stop holds an empty string; remove it")
        if self.temperature == 0 and self.n > 1:
            raise UserError(
                f"sampling.n ({self.n}) must be 1 at temperature 0 (all completions are equal); "
                "set sampling.n to 1 or raise sampling.temperature"
            )
        object.__setattr__(self, "stop", tuple(self.stop))


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to complete.

    Args:
        request_id: names the prompt; part of the address of every draw.
        prompt_ids: token ids of the whole prompt, at least one.
        num_shared: how many of the first tokens other requests share (the few-shot preamble).
        indices: which completions to draw (0 .. n-1 for all of them).
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    num_shared: int = 0
    indices: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        """Checks the sizes.

        Raises:
            UserError: if there is nothing to complete or to draw.
        """
        if not self.prompt_ids or not self.indices:
            what = "tokens" if not self.prompt_ids else "indices"
            raise UserError(f"request {self.request_id} has no {what}; leave it out")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One finished completion.

    Args:
        request_id: of the request.
        index: the completion's index within the request.
        token_ids: drawn tokens, EOS included if drawn, cut at a stop string.
        logprobs: per token, under the policy at T=1, nothing excluded.
        sampling_logprobs: per token, under the distribution drawn from.
        finish_reason: "eos", "stop" or "length".
        num_beyond: characters at the end of the tokens' text that are of the stop string.
    """

    request_id: str
    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    sampling_logprobs: tuple[float, ...]
    finish_reason: str
    num_beyond: int = 0


def address_key(seed: int, iteration: int, request_id: str) -> tuple[int, int]:
    """Returns the two 32-bit key words of a prompt's draws, the same on every machine."""
    digest = hashlib.sha256(f"{seed}/{iteration}/{request_id}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")
