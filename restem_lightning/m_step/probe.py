"""Checks on a few tokens, before the first optimizer step, that a family is trained rightly."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from restem_lightning.errors import UserError
from restem_lightning.m_step.loss import target_logits
from restem_lightning.m_step.packing import TrainingSequence, pack_step, to_device

# Share of the largest logit. Measured in float32: at most 4e-7 where packing is right (9 families),
# 0.006 to 1 for Bloom, Falcon, Mamba and LFM2. TF32 needs the room between.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


@torch.no_grad()
def check_packing(model: PreTrainedModel, device: torch.device) -> None:
    """Checks that packed sequences get what transformers' own attention gives each alone.

    Layers that carry state along the row (convolutions, recurrences), count positions by themselves
    (ALiBi) or need another attention than ours would show in the logits; something done to logits
    that the loss does not know, in the loss.

    Raises:
        UserError: if they differ.
    """
    sequences = _probe(model.config.get_text_config().vocab_size)
    (cpu_batch,) = pack_step(sequences, tokens_per_micro_batch=64).micro_batches
    micro_batch = to_device(cpu_batch, device)
    model.eval()
    logits = target_logits(model, micro_batch)
    expected = _logits_alone(model, sequences, device)
    factors = torch.ones_like(micro_batch.target_weights)
    loss = model.weighted_loss(micro_batch, factors)
    model.train()
    # Packing sorts by prompt, and these are in that order.
    error = ((logits - expected).abs().max() / expected.abs().max()).item()
    if not error <= _TOLERANCE[logits.dtype]:
        raise UserError(
            f"policy architecture ({type(model).__name__}) mixes packed sequences (logits differ by"
            f" {error:.1e}); attention-only decoders are supported; use another policy"
        )
    expected_loss = F.cross_entropy(expected.float(), micro_batch.target_ids, reduction="sum")
    error = (loss / expected_loss - 1).abs().item()
    if not error <= _TOLERANCE[logits.dtype]:
        raise UserError(
            f"policy architecture ({type(model).__name__}) does something to its logits that the"
            f" loss does not know (they differ by {error:.1e}); use another policy"
        )


def _probe(vocab_size: int) -> list[TrainingSequence]:
    """Two completions of one prompt, and one of another."""
    ids = [np.arange(12), np.r_[np.arange(6), np.arange(20, 26)], np.arange(30, 42)]
    return [TrainingSequence((each % vocab_size).astype(np.int32), 6, 1.0) for each in ids]


def _logits_alone(
    model: PreTrainedModel, sequences: list[TrainingSequence], device: torch.device
) -> Tensor:
    config = model.config.get_text_config()
    ours, config._attn_implementation = config._attn_implementation, "eager"
    try:
        rows = []
        for sequence in sequences:
            ids = torch.tensor(sequence.ids.astype(np.int64), device=device)[None]
            logits = model(input_ids=ids, use_cache=False).logits[0]
            rows.append(logits[sequence.prompt_length - 1 : -1])
        return torch.cat(rows)
    finally:
        config._attn_implementation = ours
