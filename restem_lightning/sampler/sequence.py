"""What is being decoded: shared segments of prompts, and the sequences that grow behind them."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False, kw_only=True)
class Segment:
    """A run of prompt tokens that several sequences attend to; computed once.

    Args:
        token_ids: its tokens.
        parent: the segment before it, None at the start of the prompt.
        table: its row of the block tables.
        blocks: its cache blocks, in order.
        num_scheduled: how many of its tokens have been given to the model.
        num_users: sequences (of a preamble: prompts) that still need it.
        is_preamble: whether prompts of several requests share it.
        logits: [V] after its last token, kept until every sequence behind it has started.
    """

    token_ids: tuple[int, ...]
    parent: "Segment | None" = None
    table: int = -1
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
        lane: its row of the decode batch while it is running, else -1.
        token_ids: tokens drawn, as far as the host has seen them.
        logprobs: of these tokens at T=1.
        sampling_logprobs: of these tokens under the distribution drawn from.
        num_drawn: draws given to the device; the host sees their tokens later.
        blocks: cache blocks of its own tokens.
        num_cached: how many of its own tokens have their keys and values in the cache.
        saved: keys and values of a preempted sequence, taken out of the cache.
        ended: whether no more of its draws count.
    """

    request_id: str
    index: int
    key: tuple[int, int]
    prompt: Segment
    lane: int = -1
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampling_logprobs: list[float] = field(default_factory=list)
    num_drawn: int = 0
    blocks: list[int] = field(default_factory=list)
    num_cached: int = 0
    saved: Any = None
    ended: bool = False
