"""torch's own kernel over packed segments as this torch has it; test_gpu.py looks at its values."""

import torch

from restem_lightning.m_step.attention import _torch_varlen
from restem_lightning.m_step.packing import Segments


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
