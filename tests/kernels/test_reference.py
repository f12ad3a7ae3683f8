"""The definitions themselves: random words, noise, and the rules that exclude tokens."""

import math

import pytest
import torch
from restem_kernels.reference import (
    gumbel_noise,
    philox,
    process_logits,
    sample_tokens,
    to_gumbel,
)
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

ONES = 2**32 - 1
# Rows 0 and 1 of the published test vectors, and the one with the digits of pi.
KNOWN_ANSWERS = [
    ((0, 0), (0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((ONES, ONES), (ONES,) * 4, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def random_logits(num_rows: int, num_tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(num_rows, num_tokens, generator=generator)


@pytest.mark.parametrize(("key", "counter", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_published_words(key, counter, words):
    got = philox(torch.tensor(key), tuple(torch.tensor(value) for value in counter))
    assert " ".join(f"{int(word):08x}" for word in got) == words


def test_philox_takes_each_key_with_each_counter():
    keys = torch.tensor([[0, 0], [5, 7]])[:, None, :]
    counters = (torch.arange(3), torch.tensor(0), torch.tensor(0), torch.tensor(0))
    together = torch.stack(philox(keys, counters), -1)
    assert together.shape == (2, 3, 4)
    alone = philox(torch.tensor([5, 7]), (torch.tensor(2), *counters[1:]))
    assert together[1, 2].tolist() == [int(word) for word in alone]


def test_noise_has_the_gumbel_distribution():
    noise = gumbel_noise(
        torch.tensor([[1, 2]]), torch.tensor([3]), torch.tensor([4]), torch.arange(40000)[None]
    )
    ordered = noise.flatten().double().sort().values
    expected = torch.exp(-torch.exp(-ordered))
    empirical = torch.arange(1, 40001) / 40000
    assert (expected - empirical).abs().max() < 1.63 / math.sqrt(40000)  # Kolmogorov, 1 %


def test_noise_is_finite_at_both_ends_of_the_words():
    assert to_gumbel(torch.tensor([0, 1, ONES - 1, ONES])).isfinite().all()


def test_noise_of_a_token_depends_on_its_address_alone():
    key = torch.tensor([[1, 2], [3, 4]])
    index, position = torch.tensor([5, 6]), torch.tensor([7, 8])
    everything = gumbel_noise(key, index, position, torch.arange(100).expand(2, -1))
    some = gumbel_noise(key[1:], index[1:], position[1:], torch.tensor([[99, 3, 42]]))
    assert some[0].tolist() == everything[1, [99, 3, 42]].tolist()


@pytest.mark.parametrize("change", ["key", "index", "position"])
def test_noise_changes_with_every_part_of_the_address(change):
    address = {"key": [[1, 2]], "index": [3], "position": [4]}
    other = address | {change: [[1, 3]] if change == "key" else [9]}
    first, second = (
        gumbel_noise(*(torch.tensor(value) for value in parts.values()), torch.arange(8)[None])
        for parts in (address, other)
    )
    assert (first != second).all()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 20, 64, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.2])
@pytest.mark.parametrize("min_p", [0.0, 0.05, 0.6])
def test_process_logits_keeps_what_the_transformers_processors_keep(
    temperature, top_k, top_p, min_p
):
    logits = random_logits(16, 64)
    processors = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    if min_p:
        processors.append(MinPLogitsWarper(min_p))
    expected = processors(None, logits.clone())
    got = process_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    assert torch.equal(got, expected)


NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def kept(logits, **settings) -> list[int]:
    scores = process_logits(torch.tensor([logits]), **(NEUTRAL | settings))
    return scores[0].isfinite().nonzero().flatten().tolist()


def test_ties_with_the_kth_logit_are_all_kept():
    assert kept([1.0, 3.0, 2.0, 2.0, 2.0, 0.0], top_k=2) == [1, 2, 3, 4]


def test_ties_with_the_last_token_of_top_p_are_all_kept():
    assert kept([0.0, 5.0, 4.0, 4.0, 0.0], top_p=0.5) == [1]
    assert kept([0.0, 5.0, 4.0, 4.0, 0.0], top_p=0.6) == [1, 2, 3]


def test_an_all_equal_row_loses_nothing():
    assert kept([2.0] * 7, top_k=3, top_p=0.5, min_p=0.9) == list(range(7))


def test_k_of_the_vocabulary_or_more_excludes_nothing():
    assert kept([1.0, 2.0, 3.0], top_k=3) == [0, 1, 2]
    assert kept([1.0, 2.0, 3.0], top_k=99) == [0, 1, 2]


def test_forbidden_tokens_stay_forbidden():
    lowest = -math.inf
    for settings in ({}, {"top_k": 3}, {"top_p": 0.99}, {"min_p": 0.1}, {"top_k": 2, "top_p": 0.9}):
        assert 1 not in kept([1.0, lowest, 1.5, 1.2, lowest], **settings)


def test_the_likeliest_token_is_always_kept():
    assert kept([0.0, 9.0, 1.0], top_p=1e-9, min_p=0.999) == [1]


def test_temperature_zero_takes_the_lowest_of_equal_tokens():
    logits = torch.tensor([[0.0, 4.0, 4.0], [1.0, 0.0, 1.0]])
    ones = torch.ones(2, dtype=torch.int64)
    tokens, logprobs, drawn_from = sample_tokens(
        logits, torch.zeros(2, 2, dtype=torch.int64), ones, ones, temperature=0.0, top_k=1
    )
    assert tokens.tolist() == [1, 0]
    assert torch.allclose(logprobs, logits.log_softmax(-1)[[0, 1], [1, 0]])
    assert drawn_from.tolist() == [0.0, 0.0]
