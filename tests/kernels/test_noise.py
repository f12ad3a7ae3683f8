"""The noise inside Triton kernels against its definition, bit by bit."""

import torch
import triton
import triton.language as tl
from restem_kernels import noise, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ONES = 2**32 - 1


def random_words(num: int) -> torch.Tensor:
    """Returns words of every magnitude, from both ends, and the ends themselves."""
    generator = torch.Generator().manual_seed(0)
    magnitudes = 2 ** (32 * torch.rand(num, generator=generator, dtype=torch.float64))
    uniform = torch.randint(0, 2**32, (num,), generator=generator)
    ends = torch.tensor([0, 1, 2, ONES - 1, ONES, 2**31, 2**31 - 1, 2**31 + 1])
    return torch.cat([uniform, magnitudes.long(), ONES - magnitudes.long(), ends])


@triton.jit
def _gumbel_kernel(words_ptr, noise_ptr, length, SIZE: tl.constexpr):
    offsets = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    inside = offsets < length
    words = tl.load(words_ptr + offsets, mask=inside, other=0).to(tl.uint32)
    tl.store(noise_ptr + offsets, noise.to_gumbel(words), mask=inside)


@triton.jit
def _addressed_kernel(key_ptr, index_ptr, position_ptr, noise_ptr, bounds_ptr, SIZE: tl.constexpr):
    row = tl.program_id(0)
    token_ids = tl.arange(0, SIZE)
    drawn = noise.noise_of(token_ids, row, key_ptr, index_ptr, position_ptr)
    tl.store(noise_ptr + row * SIZE + token_ids, drawn)
    counter = tl.arange(0, SIZE // 4).to(tl.uint32)
    bounds = noise.noise_bounds(counter, row, key_ptr, index_ptr, position_ptr)
    tl.store(bounds_ptr + row * SIZE + token_ids, bounds)


def test_noise_is_that_of_the_reference_bit_by_bit():
    words = random_words(20000)
    got = torch.full(words.shape, torch.nan, device=DEVICE)
    _gumbel_kernel[(triton.cdiv(len(words), 4096),)](
        words.to(DEVICE), got, len(words), SIZE=4096, enable_fp_fusion=False
    )
    assert torch.equal(got.cpu(), reference.to_gumbel(words))


def test_noise_of_an_address_is_that_of_the_reference_and_within_its_bound():
    key = torch.tensor([[0, 0], [ONES, ONES], [2**31 + 5, 7], [123456789, 987654321]])
    index, position = torch.tensor([0, ONES, 5, 31]), torch.tensor([0, ONES, 700, 2**31])
    got, bounds = torch.full((2, 4, 1024), torch.nan, device=DEVICE)
    _addressed_kernel[(4,)](
        *(tensor.to(DEVICE) for tensor in (key, index, position)),
        got,
        bounds,
        SIZE=1024,
        enable_fp_fusion=False,
    )
    expected = reference.gumbel_noise(key, index, position, torch.arange(1024).expand(4, -1))
    assert torch.equal(got.cpu(), expected)
    slack = bounds - got
    assert slack.min() > -1e-4  # it is made with a few roundings at a magnitude of 100
    assert slack[got > 4].max() < 0.08


def test_noise_of_the_reference_is_near_the_exact_one():
    words = random_words(20000)
    uniform = (words.float() * 2.0**-32 + 2.0**-33).clamp_max(1.0 - 2.0**-24).double()
    exact = -torch.log(-torch.log1p(-uniform))
    error = (reference.to_gumbel(words) - exact).abs() / exact.abs().clamp_min(1.0)
    assert error.max() < 4e-7
