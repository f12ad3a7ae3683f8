"""Log-likelihoods of whole completions under a causal language model.

Shape legend: S sequences, B rows of a batch, T tokens of a row, N target tokens.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from restem_lightning.m_step.module import target_logits
from restem_lightning.m_step.packing import MicroBatch, TrainingSequence


def sequence_logprobs(
    model: PreTrainedModel, sequences: Sequence[TrainingSequence], device: torch.device
) -> Tensor:
    """Returns each sequence's log-probability of its completion given its prompt, float32 [S].

    The sequences go through the model together, one to a row, padded on the right.
    """
    longest = max(len(sequence.ids) for sequence in sequences)
    ids = np.zeros((len(sequences), longest), dtype=np.int64)
    index, targets, rows = [], [], []
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence.ids)] = sequence.ids
        first, end = sequence.prompt_length - 1, len(sequence.ids) - 1
        index.append(np.arange(first, end) + row * longest)
        targets.append(sequence.ids[sequence.prompt_length :].astype(np.int64))
        rows.append(np.full(end - first, row))
    row_of, target_ids, target_index = (
        torch.from_numpy(np.concatenate(parts)).to(device) for parts in (rows, targets, index)
    )
    batch = MicroBatch(
        input_ids=torch.from_numpy(ids).to(device),
        position_ids=torch.arange(longest, device=device).expand(len(sequences), -1),
        target_index=target_index,
        target_ids=target_ids,
        target_weights=torch.ones_like(target_ids, dtype=torch.float32),
        target_lengths=torch.bincount(row_of)[row_of],
    )
    logprobs = target_logits(model, batch).float().log_softmax(-1)
    taken = logprobs.gather(1, target_ids[:, None])[:, 0]
    return torch.zeros(len(sequences), device=device).index_add(0, row_of, taken)


@torch.no_grad()
def all_logprobs(
    model: PreTrainedModel,
    sequences: Sequence[TrainingSequence],
    device: torch.device,
    *,
    tokens_per_batch: int,
) -> Tensor:
    """Returns `sequence_logprobs` of any number of sequences, float32 [S] on the CPU.

    Args:
        model: in any mode; it has no dropout.
        sequences: in any order; similar lengths share a batch.
        device: of the model.
        tokens_per_batch: most tokens of a batch, padding included; one sequence always goes.
    """
    order = sorted(range(len(sequences)), key=lambda number: len(sequences[number].ids))
    result = torch.zeros(len(sequences))
    while order:
        longest = len(sequences[order[-1]].ids)
        size = max(1, tokens_per_batch // longest)
        order, some = order[:-size], order[-size:]
        result[some] = sequence_logprobs(model, [sequences[n] for n in some], device).cpu()
    return result
