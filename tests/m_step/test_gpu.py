"""What only a GPU has: one kernel for all segments, in bfloat16."""

import pytest
import torch

from restem_lightning.m_step.attention import PackedAttention, _varlen_kernel, packed_attention
from restem_lightning.m_step.packing import TrainingSequence, pack_step, to_device

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("window", [None, 16])
def test_the_kernel_of_all_segments_is_as_exact_as_one_segment_after_the_other(window):
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(99, (n,), generator=generator).tolist()  # noqa: E731
    preamble, sequences = draw(70), []
    for length in (3, 40, 130):
        for _ in range(2):
            ids = torch.tensor(preamble + draw(length), dtype=torch.int32).numpy()
            sequences.append(TrainingSequence(ids, 72, 1.0))
    (batch,) = pack_step(sequences, tokens_per_micro_batch=9999).micro_batches
    size = batch.input_ids.shape[1]
    inputs = [torch.randn(1, heads, size, 64, generator=generator) for heads in (6, 2, 2)]
    slope = torch.randn(1, size, 6, 64, generator=generator)

    def run(device, dtype):
        tensors = [each.to(device, dtype).requires_grad_() for each in inputs]
        packed = PackedAttention(to_device(batch, torch.device(device)).segments)
        mixed, _ = packed_attention(
            torch.nn.Module(), *tensors, None, packed=packed, scaling=0.125, sliding_window=window
        )
        mixed.backward(slope.to(device, dtype))
        return [each.float().cpu() for each in (mixed.detach(), *(t.grad for t in tensors))]

    assert _varlen_kernel("cuda", torch.bfloat16, False) is not None
    exact = run("cpu", torch.float32)
    plain, kernel = run("cpu", torch.bfloat16), run("cuda", torch.bfloat16)
    for right, one, other in zip(exact, plain, kernel, strict=True):
        assert (other - right).abs().max() <= 2 * (one - right).abs().max()
