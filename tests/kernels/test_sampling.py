"""The fast draw against its definition, and against the exact distribution."""

import math

import pytest
import torch
from restem_kernels import reference
from restem_kernels.sampling import sample_tokens

SETTINGS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 40},
    {"temperature": 1.5, "top_k": 5, "top_p": 0.8},
    {"temperature": 0.7, "top_k": 40, "top_p": 0.95, "min_p": 0.02},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 0.9, "min_p": 0.1},
    {"temperature": 1.0, "top_k": 1},
]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def addresses(num_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = torch.arange(num_rows)
    return torch.stack([rows * 7919 + 1, rows % 3], -1), rows % 5, rows * 2


def random_logits(num_rows: int, num_tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_rows + num_tokens)
    return 4 * torch.randn(num_rows, num_tokens, generator=generator)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("num_tokens", [3, 200, 2001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draws_are_those_of_the_reference(settings, num_tokens, dtype):
    logits = random_logits(64, num_tokens).to(dtype)
    expected = reference.sample_tokens(logits, *addresses(64), **settings)
    got = sample_tokens(logits, *addresses(64), **settings)
    assert torch.equal(got[0], expected[0])
    assert torch.allclose(got[1], expected[1], atol=2e-6, rtol=0)
    assert torch.allclose(got[2], expected[2], atol=2e-6, rtol=0)


def test_draws_with_more_ties_than_spare_candidates_are_those_of_the_reference():
    logits = random_logits(32, 1000).to(torch.bfloat16)
    logits[::2] = logits[::2].round()  # hundreds of equal values
    logits[5] = 1.0  # all equal
    settings = {"temperature": 0.8, "top_k": 10}
    expected = reference.sample_tokens(logits, *addresses(32), **settings)
    for got, wanted in zip(
        sample_tokens(logits, *addresses(32), **settings), expected, strict=True
    ):
        assert torch.allclose(got.float(), wanted.float(), atol=2e-6, rtol=0)


def test_forbidden_tokens_are_never_drawn():
    logits = random_logits(400, 300)
    logits[:, 7:] = -math.inf  # fewer than k are left
    for settings in SETTINGS:
        tokens, logprobs, drawn_from = sample_tokens(logits, *addresses(400), **settings)
        assert int(tokens.max()) < 7
        assert logprobs.isfinite().all()
        assert drawn_from.isfinite().all()


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_draws_the_same_bits_in_any_batch(settings, dtype):
    logits = random_logits(70, 500).to(dtype)
    logits[::3] = logits[::3].round()
    together = sample_tokens(logits, *addresses(70), **settings)
    for rows in (torch.arange(70).flip(0), torch.tensor([41]), torch.tensor([3, 66, 10])):
        parts = (tensor[rows] for tensor in (logits, *addresses(70)))
        for part, whole in zip(sample_tokens(*parts, **settings), together, strict=True):
            assert torch.equal(part, whole[rows])


def test_both_log_probabilities_are_of_the_drawn_token():
    logits = random_logits(50, 100)
    settings = {"temperature": 0.7, "top_k": 12, "top_p": 0.9, "min_p": 0.01}
    tokens, logprobs, drawn_from = sample_tokens(logits, *addresses(50), **settings)
    exact = logits.double().log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
    assert torch.allclose(logprobs.double(), exact, atol=1e-6, rtol=0)
    scores = reference.process_logits(logits, **settings).double()
    exact = scores.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
    assert torch.allclose(drawn_from.double(), exact, atol=1e-6, rtol=0)


def chi_square_excess(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Returns how many standard deviations the chi-square statistic lies above its mean.

    Tokens with fewer than 10 expected draws are pooled.
    """
    expected = probabilities * counts.sum()
    rare = expected < 10
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    counts, expected = counts[expected > 0], expected[expected > 0]
    degrees = len(counts) - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return (statistic - degrees) / math.sqrt(2 * max(degrees, 1))


@pytest.mark.parametrize("settings", SETTINGS[1:])
def test_frequencies_are_those_of_the_exact_distribution(settings):
    num_draws, num_tokens = 20000, 256
    logits = 2 * torch.randn(num_tokens, generator=torch.Generator().manual_seed(1))
    rows = torch.arange(num_draws)
    key = torch.tensor([[123, 456]]).expand(num_draws, -1)
    tokens, _, _ = sample_tokens(
        logits.expand(num_draws, -1), key, rows % 100, rows // 100, **settings
    )
    neutral = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    scores = reference.process_logits(logits[None], **(neutral | settings))
    exact = scores[0].double().softmax(-1)
    counts = tokens.bincount(minlength=num_tokens)
    assert (counts[exact == 0] == 0).all()
    assert chi_square_excess(counts, exact) < 4


def test_the_chi_square_bound_notices_a_wrong_temperature():
    logits = 2 * torch.randn(256, generator=torch.Generator().manual_seed(1))
    rows = torch.arange(20000)
    key = torch.tensor([[123, 456]]).expand(len(rows), -1)
    tokens, _, _ = sample_tokens(
        logits.expand(len(rows), -1), key, rows % 100, rows // 100, temperature=1.05
    )
    exact = logits.double().softmax(-1)
    assert chi_square_excess(tokens.bincount(minlength=256), exact) > 4
