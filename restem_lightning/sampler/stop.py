"""Stop strings: when a completion has written one, and which of its tokens come before it."""

from collections.abc import Callable, Sequence


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

    def cut(self, token_ids: Sequence[int]) -> int | None:
        """Returns how many leading tokens come before a stop string, None if there is none.

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
        kept = len(token_ids)
        while kept > tail_start and len(self.decode(list(token_ids[tail_start:kept]))) > min(found):
            kept -= 1
        return kept
