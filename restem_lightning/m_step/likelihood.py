"""Log-likelihoods of whole completions under a causal language model.

Shape legend: S sequences, T completion tokens of all of them.
"""

from collections.abc import Iterator, Sequence

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

# The most that `prompt_groups` reads from their file at a time.
HELD_SEQUENCES = 4096


def token_logprobs(
    model: PreTrainedModel, sequences: Sequence[TrainingSequence], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Returns the log-probability of each completion token and the sequence that it is of.

    The sequences go through the model together; what their prompts begin with alike goes once.

    Returns:
        float32 [T] and int64 [T] on the device: a sequence's tokens one after the other.
    """
    num_tokens = sum(len(sequence.ids) for sequence in sequences)
    (packed,) = pack_step(sequences, tokens_per_micro_batch=num_tokens).micro_batches
    batch, order = to_device(packed, device), prompt_order(sequences)
    lengths = torch.tensor([sequences[index].completion_length for index in order])
    sequence_of = torch.tensor(order).repeat_interleave(lengths).to(device)
    logprobs = target_logits(model, batch).float().log_softmax(-1)
    return logprobs.gather(1, batch.target_ids[:, None])[:, 0], sequence_of


def sequence_logprobs(
    model: PreTrainedModel, sequences: Sequence[TrainingSequence], device: torch.device
) -> Tensor:
    """Returns each sequence's log-probability of its completion given its prompt, float32 [S]."""
    logprobs, sequence_of = token_logprobs(model, sequences, device)
    return torch.zeros(len(sequences), device=device).index_add(0, sequence_of, logprobs)


def prompt_groups(
    sequences: Sequence[TrainingSequence], *, tokens_per_batch: int
) -> Iterator[list[int]]:
    """Yields which sequences go through the model together: neighbours with alike prompts.

    Args:
        sequences: in any order, in memory or in files.
        tokens_per_batch: most tokens of a batch; one sequence always goes.
    """
    for first in range(0, len(sequences), HELD_SEQUENCES):
        held = [sequences[n] for n in range(first, min(first + HELD_SEQUENCES, len(sequences)))]
        some, total = [], 0
        for place in prompt_order(held):
            length = len(held[place].ids)
            if some and total + length > tokens_per_batch:
                yield some
                some, total = [], 0
            some.append(first + place)
            total += length
        yield some


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
        sequences: as for `prompt_groups`.
        device: of the model.
        tokens_per_batch: most tokens of a batch; one sequence always goes.
    """
    result = torch.zeros(len(sequences))
    for some in prompt_groups(sequences, tokens_per_batch=tokens_per_batch):
        result[some] = sequence_logprobs(model, [sequences[n] for n in some], device).cpu()
    return result
