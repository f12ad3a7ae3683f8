"""Stop strings, on an alphabet of tokens that overlap."""

import pytest

from restem_lightning.sampler.stop import StopStrings

TEXTS = ["a", "b", "ab", "ba", "\n\n", "\n", "Q:", " Q", ":", "long word "]


def decode(token_ids):
    return "".join(TEXTS[token] for token in token_ids)


def first_cut(stop, texts):
    """Returns the number of tokens after which cut first finds something, and its result."""
    search = StopStrings(stop, decode)
    token_ids = [TEXTS.index(text) for text in texts]
    for length in range(1, len(token_ids) + 1):
        if (kept := search.cut(token_ids[:length])) is not None:
            return length, kept
    return None


@pytest.mark.parametrize(
    ("stop", "texts", "expected"),
    [
        (("Q:",), ["a", "Q:", "b"], (2, 1)),  # one token
        (("Q:",), ["a", " Q", ":"], (3, 1)),  # across tokens, with text before it in its token
        (("\n\n",), ["a", "\n", "\n"], (3, 1)),
        (("\n\nQ:",), ["a", "\n\n", "\n", "\n", "Q:"], (5, 2)),
        (("bab",), ["a", "ba", "ba"], (3, 1)),  # ends inside a token
        (("Q:", "b"), ["ab", "Q:"], (1, 0)),  # the earliest of several
        (("Q:",), ["a", "b", "\n\n"], None),
        ((), ["a", "Q:"], None),
        (("word long",), ["a", "long word ", "long word "], (3, 1)),
    ],
)
def test_cut_leaves_the_tokens_before_the_stop_string(stop, texts, expected):
    assert first_cut(stop, texts) == expected


def test_stop_strings_of_characters_split_over_tokens_are_found():
    raw = "a\u4e2d\u6587b".encode()

    def decode_bytes(token_ids):
        return bytes(token_ids).decode(errors="replace")

    search = StopStrings(("\u6587",), decode_bytes)
    cuts = [search.cut(list(raw[:length])) for length in range(1, len(raw) + 1)]
    assert cuts[:7] == [None] * 6 + [4]
