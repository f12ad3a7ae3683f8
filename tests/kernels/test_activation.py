"""The gated activation kernel against its definition."""

import pytest
import torch
from restem_kernels import reference
from restem_kernels.activation import gated_silu

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def gate_up(num_rows, size, dtype, *, stride=None):
    """Returns gate and up side by side; rows lie `stride` elements apart, NaN between them."""
    generator = torch.Generator().manual_seed(num_rows + size)
    rows = torch.full((num_rows, stride or 2 * size), torch.nan, dtype=dtype, device=DEVICE)
    values = 3 * torch.randn(num_rows, 2 * size, generator=generator)
    rows[:, : 2 * size] = values.to(DEVICE, dtype)
    return rows[:, : 2 * size]


@pytest.mark.parametrize("size", [1, 3, 64, 1023, 1024, 1025, 4864, 20000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_product_is_that_of_the_reference(size, dtype):
    both = gate_up(2, size, dtype)
    got, wanted = gated_silu(both), reference.gated_silu(both)
    assert got.shape == (2, size)
    assert got.dtype == dtype
    gate, up = both.double().chunk(2, dim=-1)
    truth = gate * torch.sigmoid(gate) * up
    # At most twice the error of plain torch in the same dtype, which may be none. The exponential
    # of a GPU is good to a few units; the interpreter cuts both roundings to bfloat16 off.
    units = {torch.float32: 4, torch.float16: 1, torch.bfloat16: 2}[dtype]
    floor = units * torch.finfo(dtype).eps * truth.abs().max()
    error, allowed = ((x.double() - truth).abs().max() for x in (got, wanted))
    assert error <= max(2 * allowed, floor)
    if dtype == torch.float16:  # rounded as the reference rounds: only a tie may fall otherwise
        assert int((got != wanted).sum()) <= 1 + 0.002 * got.numel()


@pytest.mark.parametrize("num_rows", [0, 1, 2, 33])
def test_any_number_of_rows(num_rows):
    both = gate_up(num_rows, 20, torch.float32)
    torch.testing.assert_close(gated_silu(both), reference.gated_silu(both))


def test_rows_may_lie_apart():
    both = gate_up(5, 30, torch.float32, stride=101)
    torch.testing.assert_close(gated_silu(both), reference.gated_silu(both))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's, in the interpreter
@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_far_from_zero_give_the_limits(dtype):
    both = torch.tensor([[-1e4, -200.0, 0.0, 200.0, 1e4, 1.0, 1.0, 1.0, 1.0, 1.0]])
    got = gated_silu(both.to(DEVICE, dtype))
    assert torch.equal(got, reference.gated_silu(both.to(DEVICE, dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_any_batch(dtype):
    both = gate_up(9, 1100, dtype)
    together = gated_silu(both)
    for rows in ([4], [8, 0], list(range(9))[::-1]):
        assert torch.equal(gated_silu(both[rows]), together[rows])
