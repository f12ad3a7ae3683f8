"""Stop strings: when a completion has written one, and which of its tokens come before it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple


class Cut(NamedTuple):
    """Where a completion ends that has written a stop string.

    Attributes:
        num_tokens: leading tokens that are kept.
        num_beyond: characters at their end that are of the stop string and no text.
    """

    num_tokens: int
    num_beyond: int


class StopStrings:
    """Finds stop strings in the text of tokens, looking only where a new token can end one."""

    def __init__(self, stop: Sequence[str], decode: Callable[[list[int]], str]):
        """Prepares the search.

        Args:
            stop: strings that end a completion; none means never.
            decode: token ids to text.
        """
        self.stop, self.decode = tuple(stop), decode
        self.longest = max(map(len, self.stop), default=0)
        # A part of a character decodes to the replacement character; the rest is in other tokens.
        self.endings = {text[-1] for text in self.stop} | {"\ufffd"}
        self.can_end: dict[int, bool] = {}

    def cut(self, token_ids: Sequence[int]) -> Cut | None:
        r"""Returns which leading tokens come before a stop string, None if there is none.

        A token such as `)\n` may hold the last character before it and the first one of it. It is
        kept: the policy would learn to leave that character out. White space alone is not missed.

        Args:
            token_ids: the completion so far; only strings that its last token ends are looked for.
        """
        if not self.stop:
            return None
        last = token_ids[-1]
        if last not in self.can_end:
            self.can_end[last] = not self.endings.isdisjoint(self.decode([last]))
        if not self.can_end[last]:
            return None
        # A token holds at least one character in all but broken text, so this tail is enough.
        tail_start = max(0, len(token_ids) - 2 * self.longest - 4)
        tail = self.decode(list(token_ids[tail_start:]))
        found = [place for text in self.stop if (place := tail.find(text)) >= 0]
        if not found:
            return None
        kept, place = len(token_ids), min(found)
        while kept > tail_start and len(self.decode(list(token_ids[tail_start:kept]))) > place:
            kept -= 1
        before = self.decode(list(token_ids[tail_start:kept]))
        if before.rstrip() == tail[:place].rstrip():
            return Cut(kept, 0)
        return Cut(kept + 1, len(self.decode(list(token_ids[tail_start : kept + 1]))) - place)
