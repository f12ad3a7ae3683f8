"""Log-likelihoods of whole completions under a causal language model.

Shape legend: S sequences.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from restem_lightning.m_step.loss import target_logits
from restem_lightning.m_step.packing import (
    TrainingSequence,
    pack_step,
    prompt_order,
    to_device,
)


def sequence_logprobs(
    model: PreTrainedModel, sequences: Sequence[TrainingSequence], device: torch.device
) -> Tensor:
    """Returns each sequence's log-probability of its completion given its prompt, float32 [S].

    The sequences go through the model together; what their prompts begin with alike goes once.
    """
    num_tokens = sum(len(sequence.ids) for sequence in sequences)
    (packed,) = pack_step(sequences, tokens_per_micro_batch=num_tokens).micro_batches
    batch, order = to_device(packed, device), prompt_order(sequences)
    lengths = torch.tensor([sequences[index].completion_length for index in order])
    row_of = torch.tensor(order).repeat_interleave(lengths).to(device)
    logprobs = target_logits(model, batch).float().log_softmax(-1)
    taken = logprobs.gather(1, batch.target_ids[:, None])[:, 0]
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
        sequences: in any order; those with alike prompts share a batch.
        device: of the model.
        tokens_per_batch: most tokens of a batch; one sequence always goes.
    """
    result, some, total = torch.zeros(len(sequences)), [], 0
    for index in prompt_order(sequences):
        length = len(sequences[index].ids)
        if some and total + length > tokens_per_batch:
            result[some] = sequence_logprobs(model, [sequences[n] for n in some], device).cpu()
            some, total = [], 0
        some.append(index)
        total += length
    if some:
        result[some] = sequence_logprobs(model, [sequences[n] for n in some], device).cpu()
    return result
