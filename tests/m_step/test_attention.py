"""torch's own kernel over packed segments as this torch has it; test_gpu.py looks at its values."""

import numpy as np
import pytest
import torch

from restem_lightning.m_step import attention
from restem_lightning.m_step.attention import _torch_varlen
from restem_lightning.m_step.loss import target_logits
from restem_lightning.m_step.packing import Segments, TrainingSequence, pack_step
from restem_lightning.m_step.weights import load_policy


def test_torch_takes_grouped_heads_and_windows_over_packed_segments():
    draw = lambda *shape: torch.empty(*shape, dtype=torch.bfloat16, device="meta").requires_grad_()  # noqa: E731
    query, key, value = draw(20, 6, 64), draw(30, 2, 64), draw(30, 2, 64)
    ends = torch.empty(3, dtype=torch.int32, device="meta")
    segments = Segments(
        key_index=None, query_ends=ends, key_ends=ends, query_lengths=(10, 10), key_lengths=(10, 20)
    )
    for window in (None, 8):
        mixed = _torch_varlen()(query, key, value, segments, 0.125, window, None)
        assert mixed.shape == query.shape
        mixed.sum().backward()
    assert key.grad.shape == key.shape


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_under_autocast_the_kernel_of_all_segments_gets_one_type(family, make_policy, monkeypatch):
    asked, given = set(), set()

    def kernel(query, key, value, *_):
        given.update(each.dtype for each in (query, key, value))
        return torch.zeros_like(query)

    def kernel_for(device_type, dtype, softcap):
        asked.add(dtype)
        return kernel

    monkeypatch.setattr(attention, "_varlen_kernel", kernel_for)
    sequences = [TrainingSequence(np.arange(9, dtype=np.int32) + n, 6, 1.0) for n in (0, 0, 20)]
    (batch,) = pack_step(sequences, tokens_per_micro_batch=99).micro_batches
    assert batch.segments.key_index is not None
    with torch.autocast("cpu", torch.bfloat16):
        target_logits(load_policy(make_policy(family)), batch)
    assert asked == given == {torch.bfloat16}
