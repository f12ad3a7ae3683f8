"""Stop strings, on an alphabet of tokens that overlap."""

import pytest

from restem_lightning.sampler.stop import StopStrings

TEXTS = ["a", "b", "ab", "ba", "\n\n", "\n", "Q:", " Q", ":", "long word ", ")\n", "}", "[DONE]"]


def decode(token_ids):
    return "".join(TEXTS[token] for token in token_ids)


def first_cut(stop, texts):
    """Returns the number of tokens after which cut first finds something, then its result."""
    search = StopStrings(stop, decode)
    token_ids = [TEXTS.index(text) for text in texts]
    for length in range(1, len(token_ids) + 1):
        if (cut := search.cut(token_ids[:length])) is not None:
            return length, *cut
    return None


@pytest.mark.parametrize(
    ("stop", "texts", "expected"),
    [
        (("Q:",), ["a", "Q:", "b"], (2, 1, 0)),  # one token
        (("Q:",), ["a", " Q", ":"], (3, 1, 0)),  # across tokens, with a space before it
        (("\n\n",), ["a", "\n", "\n"], (3, 1, 0)),
        (("\n\nQ:",), ["a", "\n\n", "\n", "\n", "Q:"], (5, 2, 0)),
        (("bab",), ["a", "ba", "ba"], (3, 1, 0)),  # ends inside a token
        (("Q:", "b"), ["ab", "Q:"], (1, 1, 1)),  # the earliest of several
        (("Q:",), ["a", "b", "\n\n"], None),
        ((), ["a", "Q:"], None),
        (("word long",), ["a", "long word ", "long word "], (3, 2, 5)),
    ],
)
def test_cut_leaves_the_tokens_before_the_stop_string(stop, texts, expected):
    assert first_cut(stop, texts) == expected


def test_text_that_shares_a_token_with_a_stop_string_is_kept():
    assert first_cut(("\n[DONE]",), ["a", ")\n", "[DONE]"]) == (3, 2, 1)
    assert first_cut(("\n\n",), ["}", ")\n", "\n"]) == (3, 2, 1)
    assert first_cut(("\n[DONE]",), ["}", "\n", "[DONE]"]) == (3, 1, 0)


def test_stop_strings_of_characters_split_over_tokens_are_found():
    raw = "a\u4e2d\u6587b".encode()

    def decode_bytes(token_ids):
        return bytes(token_ids).decode(errors="replace")

    search = StopStrings(("\u6587",), decode_bytes)
    cuts = [search.cut(list(raw[:length])) for length in range(1, len(raw) + 1)]
    assert cuts[:7] == [None] * 6 + [(4, 0)]
