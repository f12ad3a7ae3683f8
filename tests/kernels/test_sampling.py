"""All implementations of the draw against its definition, and against the exact distribution."""

import math

import pytest
import torch
from restem_kernels import cpu, cpu_compiled, reference, sampling

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SETTINGS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7},
    {"temperature": 0.7, "top_k": 40},
    {"temperature": 1.5, "top_k": 5, "top_p": 0.8},
    {"temperature": 0.7, "top_k": 40, "top_p": 0.95, "min_p": 0.02},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 0.8, "top_p": 0.95, "min_p": 0.01},
    {"temperature": 0.9, "min_p": 0.1},
    {"temperature": 1.0, "top_k": 1},
]
NEUTRAL = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}

Drawn = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def draw_torch(*tensors: torch.Tensor, **settings: float) -> Drawn:
    return cpu.sample_tokens(*tensors, **settings)


def draw_triton(*tensors: torch.Tensor, **settings: float) -> Drawn:
    drawn = sampling.sample_tokens(*(tensor.to(DEVICE) for tensor in tensors), **settings)
    return tuple(tensor.cpu() for tensor in drawn)


def draw_c(*tensors: torch.Tensor, **settings: float) -> Drawn:
    return cpu_compiled.sample_tokens(*tensors, **settings)


IMPLEMENTATIONS = [draw_torch, draw_c, draw_triton]


def few(draw, num_rows: int, num_interpreted: int) -> int:
    """Returns num_rows, or num_interpreted where Triton is interpreted: a row takes 0.1 s."""
    return num_interpreted if draw is draw_triton and DEVICE == "cpu" else num_rows


def addresses(num_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = torch.arange(num_rows)
    return torch.stack([rows * 7919 + 1, rows % 3], -1), rows % 5, rows * 2


def random_logits(num_rows: int, num_tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_rows + num_tokens)
    return 4 * torch.randn(num_rows, num_tokens, generator=generator)


def assert_draws_as_the_reference(draw, logits: torch.Tensor, **settings: float) -> Drawn:
    """The same tokens; log-probabilities at most twice as wrong as plain torch, or by 2e-6."""
    expected = reference.sample_tokens(logits, *addresses(len(logits)), **settings)
    got = draw(logits, *addresses(len(logits)), **settings)
    assert [tensor.dtype for tensor in got] == [torch.int64, torch.float32, torch.float32]
    assert torch.equal(got[0], expected[0])
    for mine, theirs, exact in zip(
        got[1:], expected[1:], exact_logprobs(logits, got[0], **settings), strict=True
    ):
        allowed = max(2 * (theirs - exact).abs().max().item(), 2e-6)
        assert (mine - exact).abs().max() <= allowed
    return got


def exact_logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, *, temperature: float, **settings: float
) -> list[torch.Tensor]:
    """Returns both log-probabilities of the tokens in float64."""
    wide = logits.double()
    if temperature == 0.0:
        scaled = torch.full_like(wide, -math.inf).scatter(1, tokens[:, None], 0.0)
    else:
        kept = reference.process_logits(logits, temperature=temperature, **(NEUTRAL | settings))
        scaled = (wide / temperature).masked_fill(kept.isinf(), -math.inf)
    return [
        scores.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1) for scores in (wide, scaled)
    ]


# Triton's interpreter takes a third of a second for a draw: there each size has one type.
SIZES = [
    (draw, size, dtype)
    for draw in IMPLEMENTATIONS
    for place, size in enumerate([3, 200, 2001, 5000])
    for dtype in (DTYPES if few(draw, True, False) else [DTYPES[place % len(DTYPES)]])
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(("draw", "num_tokens", "dtype"), SIZES)
def test_draws_are_those_of_the_reference(draw, settings, num_tokens, dtype):
    logits = random_logits(few(draw, 64, 2), num_tokens).to(dtype)
    assert_draws_as_the_reference(draw, logits, **settings)


@pytest.mark.parametrize("num_tokens", [152064, 262144])
@pytest.mark.parametrize(
    "settings",
    [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 40}, {"temperature": 0.6, "top_p": 0.9}],
)
def test_draws_from_large_vocabularies_are_those_of_the_reference(num_tokens, settings):
    logits = random_logits(few(draw_triton, 16, 2), num_tokens).to(torch.bfloat16)
    assert_draws_as_the_reference(draw_triton, logits, **settings)


def test_a_flat_distribution_whose_mass_lies_outside_of_the_gathered_tokens():
    logits = random_logits(1, 152064) / 20
    assert_draws_as_the_reference(draw_triton, logits.half(), temperature=1.0, top_p=0.9)


@pytest.mark.parametrize("settings", [s | {"top_k": s.get("top_k") and 10} for s in SETTINGS])
@pytest.mark.parametrize("draw", IMPLEMENTATIONS)
def test_masses_of_ties_draw_as_in_the_reference(draw, settings):
    logits = random_logits(3, 5000).to(torch.bfloat16)
    logits[0] = logits[0].round()  # hundreds of equal values
    logits[1] = 1.0  # all equal, more than are gathered at most
    logits[2, 40:] = logits[2, 40:].clamp_max(2.0)  # equal ones in all groups and tiles
    settings = {name: value for name, value in settings.items() if value is not None}
    assert_draws_as_the_reference(draw, logits, **settings)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("draw", IMPLEMENTATIONS)
def test_zeros_of_both_signs_are_ties(draw, dtype):
    logits = torch.tensor([[1.0, 0.0, -0.0, -1.0], [1.0, -0.0, 0.0, -1.0]]).to(dtype)
    assert_draws_as_the_reference(draw, logits, temperature=1.3, top_k=2)
    assert_draws_as_the_reference(draw, logits, temperature=1.3, top_p=0.9)


@pytest.mark.parametrize("top_k", [39, 41, 1000, 4999, 5000, 9999])
@pytest.mark.parametrize("draw", IMPLEMENTATIONS)
def test_k_beyond_the_groups_of_tokens_or_the_vocabulary(draw, top_k):
    logits = random_logits(few(draw, 16, 2), 5000)
    assert_draws_as_the_reference(draw, logits, temperature=0.9, top_k=top_k, top_p=0.97)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("draw", IMPLEMENTATIONS)
def test_forbidden_tokens_are_never_drawn(draw, settings):
    num_rows = few(draw, 40, 2)
    logits = random_logits(2 * num_rows, 5000)
    allowed = torch.zeros(2 * num_rows, 5000, dtype=torch.bool)
    allowed[:num_rows, :7] = True  # fewer than k are left, and whole groups and tiles go
    allowed[num_rows:, 4900::9] = True
    logits = logits.masked_fill(~allowed, -math.inf)
    tokens, logprobs, drawn_from = assert_draws_as_the_reference(draw, logits, **settings)
    assert allowed.gather(1, tokens[:, None]).all()
    assert logprobs.isfinite().all()
    assert drawn_from.isfinite().all()


@pytest.mark.parametrize("settings", SETTINGS)
def test_rows_with_nothing_to_draw_give_a_token_and_nan(settings):
    logits = random_logits(4, 5000)
    logits[0] = -math.inf
    logits[1] = math.nan
    logits[2, 77] = math.nan
    tokens, logprobs, _ = draw_triton(logits, *addresses(4), **settings)
    assert (tokens >= 0).all()
    assert (tokens < 5000).all()
    assert logprobs.isnan().tolist() == [True, True, True, False]
    assert tokens[3] == reference.sample_tokens(logits, *addresses(4), **settings)[0][3]


@pytest.mark.parametrize("num_tokens", [49152, 151936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draws_in_c_from_large_vocabularies_are_those_of_the_reference(dtype, num_tokens):
    wide = random_logits(8, num_tokens + 5).to(dtype)
    logits = wide[:, 2:-3]  # rows that lie apart
    assert_draws_as_the_reference(draw_c, logits, temperature=0.7, top_k=40, top_p=0.95)


@pytest.mark.parametrize("settings", SETTINGS)
def test_rows_may_lie_apart(settings):
    wide = torch.full((2, 777), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    logits = random_logits(2, 700).to(torch.bfloat16)
    wide[:, 3:703] = logits.to(DEVICE)
    expected = draw_triton(logits, *addresses(2), **settings)
    for got, wanted in zip(
        draw_triton(wide[:, 3:703], *addresses(2), **settings), expected, strict=True
    ):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("draw", IMPLEMENTATIONS)
def test_a_row_draws_the_same_bits_in_any_batch(draw, settings, dtype):
    num_rows = few(draw, 70, 3)
    logits = random_logits(num_rows, 500).to(dtype)
    logits[::3] = logits[::3].round()
    together = draw(logits, *addresses(num_rows), **settings)
    for rows in (torch.arange(num_rows).flip(0), torch.tensor([1]), torch.tensor([2, 0])):
        parts = (tensor[rows] for tensor in (logits, *addresses(num_rows)))
        for part, whole in zip(draw(*parts, **settings), together, strict=True):
            assert torch.equal(part, whole[rows])


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_captured_graph_draws_as_the_call(settings):
    first, second = random_logits(8, 5000).cuda(), random_logits(9, 5000)[:8].cuda()
    held, address = first.clone(), [tensor.cuda() for tensor in addresses(8)]
    expected = sampling.sample_tokens(second, *address, **settings)
    sampling.sample_tokens(held, *address, **settings)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = sampling.sample_tokens(held, *address, **settings)
    held.copy_(second)
    graph.replay()
    for got, wanted in zip(drawn, expected, strict=True):
        assert torch.equal(got, wanted)


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


def draw_many(draw, logits: torch.Tensor, num_draws: int, **settings: float) -> torch.Tensor:
    """Returns how often each token is drawn from one row of logits."""
    rows = torch.arange(num_draws)
    key = torch.tensor([[123, 456]]).expand(num_draws, -1)
    tokens, _, _ = draw(logits.expand(num_draws, -1), key, rows % 100, rows // 100, **settings)
    return tokens.bincount(minlength=len(logits))


@pytest.mark.parametrize("settings", SETTINGS[1:])
@pytest.mark.parametrize("draw", IMPLEMENTATIONS)
def test_frequencies_are_those_of_the_exact_distribution(draw, settings):
    if few(draw, 1, 0) == 0 and settings != {"temperature": 1.0}:
        pytest.skip("too slow without a GPU; the draws equal those of the reference")
    logits = 2 * torch.randn(256, generator=torch.Generator().manual_seed(1))
    counts = draw_many(draw, logits, few(draw, 20000, 60), **settings)
    exact = reference.process_logits(logits[None], **(NEUTRAL | settings))[0].double().softmax(-1)
    assert (counts[exact == 0] == 0).all()
    assert chi_square_excess(counts, exact) < 4


def test_the_chi_square_bound_notices_a_wrong_temperature():
    logits = 2 * torch.randn(256, generator=torch.Generator().manual_seed(1))
    counts = draw_many(draw_torch, logits, 20000, temperature=1.05)
    assert chi_square_excess(counts, logits.double().softmax(-1)) > 4
