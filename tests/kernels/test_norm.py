"""The residual sum and RMSNorm kernel against its definition."""

import pytest
import torch
from restem_kernels import reference
from restem_kernels.norm import add_rms_norm

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-5


def inputs(num_rows, size, dtype, *, stride=None):
    """Returns x, residual and weight; their rows lie `stride` elements apart, filled with NaN."""
    generator = torch.Generator().manual_seed(num_rows + size)
    stride = stride or size
    rows = torch.full((2, num_rows, stride), torch.nan, dtype=dtype, device=DEVICE)
    rows[..., :size] = torch.randn(2, num_rows, size, generator=generator).to(DEVICE, dtype)
    weight = 1 + torch.randn(size, generator=generator) / 4
    return rows[0, :, :size], rows[1, :, :size], weight.to(DEVICE, dtype)


def exact(x, weight, residual):
    total = x.double() if residual is None else x.double() + residual.double()
    mean = total.square().mean(-1, keepdim=True)
    return weight.double() * total / (mean + EPS).sqrt(), total


def assert_as_precise_as_the_reference(got, wanted, truth):
    """At most twice the error of plain torch in the same dtype."""
    # Or one unit where plain torch happens to hit the exact value; the interpreter cuts all three
    # roundings to bfloat16 off.
    units = 3 if got.dtype == torch.bfloat16 and DEVICE == "cpu" else 1
    floor = units * torch.finfo(got.dtype).eps * truth.abs().max()
    error, allowed = ((x.double() - truth).abs().max() for x in (got, wanted))
    assert error <= max(2 * allowed, floor)


@pytest.mark.parametrize("size", [1, 7, 64, 576, 896, 3000, 8192])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_residual", [True, False])
def test_norm_and_sum_are_those_of_the_reference(size, dtype, with_residual):
    x, residual, weight = inputs(3, size, dtype)
    residual = residual if with_residual else None
    got = add_rms_norm(x, weight, eps=EPS, residual=residual)
    wanted = reference.add_rms_norm(x, weight, eps=EPS, residual=residual)
    for mine, theirs, truth in zip(got, wanted, exact(x, weight, residual), strict=True):
        assert mine.dtype == dtype
        assert mine.shape == x.shape
        assert_as_precise_as_the_reference(mine, theirs, truth)
    if dtype == torch.float16:  # rounded as the reference rounds: only a tie may fall otherwise
        assert torch.equal(got[1], wanted[1])
        assert int((got[0] != wanted[0]).sum()) <= 1 + 0.002 * x.numel()


@pytest.mark.parametrize("num_rows", [0, 1, 2, 33])
def test_any_number_of_rows(num_rows):
    x, residual, weight = inputs(num_rows, 40, torch.float32)
    got = add_rms_norm(x, weight, eps=EPS, residual=residual)
    wanted = reference.add_rms_norm(x, weight, eps=EPS, residual=residual)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("with_residual", [True, False])
def test_rows_may_lie_apart(with_residual):
    x, residual, weight = inputs(5, 50, torch.float32, stride=83)
    residual = residual if with_residual else None
    got = add_rms_norm(x, weight, eps=EPS, residual=residual)
    wanted = reference.add_rms_norm(x, weight, eps=EPS, residual=residual)
    torch.testing.assert_close(got, wanted)


def test_inputs_stay_as_they_are():
    x, residual, weight = inputs(4, 24, torch.float32)
    before = [tensor.clone() for tensor in (x, residual, weight)]
    add_rms_norm(x, weight, eps=EPS, residual=residual)
    for tensor, copy in zip((x, residual, weight), before, strict=True):
        assert torch.equal(tensor, copy)


def test_a_row_of_zeros_stays_zero():
    x, _, weight = inputs(2, 48, torch.float16)
    got, _ = add_rms_norm(torch.zeros_like(x), weight, eps=EPS)
    assert (got == 0).all()


def test_large_values_do_not_overflow_the_mean_square():
    x, _, weight = inputs(2, 100, torch.float16)
    got, _ = add_rms_norm(x * 3000, weight, eps=EPS)
    wanted, _ = add_rms_norm(x, weight, eps=0.0)
    assert (got - wanted).abs().max() <= 4 * torch.finfo(torch.float16).eps * wanted.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_any_batch(dtype):
    x, residual, weight = inputs(9, 130, dtype)
    together = add_rms_norm(x, weight, eps=EPS, residual=residual)
    for rows in ([4], [8, 0], list(range(9))[::-1]):
        parts = add_rms_norm(x[rows], weight, eps=EPS, residual=residual[rows])
        for part, whole in zip(parts, together, strict=True):
            assert torch.equal(part, whole[rows])
