"""What is being decoded: shared segments of prompts, and the sequences that grow behind them."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False, kw_only=True)
class Segment:
    """A run of prompt tokens that several sequences attend to; computed once.

    Args:
        token_ids: its tokens.
        parent: the segment before it, None at the start of the prompt.
        blocks: its cache blocks, in order.
        num_scheduled: how many of its tokens have been given to the model.
        num_users: sequences that still need it.
        is_preamble: whether the requests of a whole run share it.
        logits: [V] after its last token, kept until every sequence behind it has started.
    """

    token_ids: tuple[int, ...]
    parent: "Segment | None" = None
    blocks: list[int] = field(default_factory=list)
    num_scheduled: int = 0
    num_users: int = 0
    is_preamble: bool = False
    logits: Any = None

    @property
    def start(self) -> int:
        """Returns the position of its first token."""
        return self.parent.end if self.parent else 0

    @property
    def end(self) -> int:
        """Returns the position after its last token."""
        return self.start + len(self.token_ids)

    @property
    def chain(self) -> "list[Segment]":
        """Returns the segments from the start of the prompt up to this one."""
        return [*(self.parent.chain if self.parent else []), self]


@dataclass(eq=False, kw_only=True)
class Sequence:
    """One completion being decoded.

    Args:
        request_id: of its request.
        index: completion index within the request.
        key: the two key words of its draws.
        prompt: the last segment of its prompt.
        token_ids: tokens drawn so far.
        logprobs: of these tokens at T=1.
        sampling_logprobs: of these tokens under the distribution drawn from.
        blocks: cache blocks of its own tokens.
        num_cached: how many of its own tokens have their keys and values in the cache.
    """

    request_id: str
    index: int
    key: tuple[int, int]
    prompt: Segment
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampling_logprobs: list[float] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    num_cached: int = 0
