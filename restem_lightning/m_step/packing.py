"""Packing: sequences -> rows of tokens -> micro-batches of one optimizer step. Pure and seeded.

Shape legend: B rows of a micro-batch, T tokens of a row, N target tokens of a micro-batch.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class TrainingSequence(NamedTuple):
    """One accepted completion after its prompt.

    Attributes:
        ids: prompt ids, then completion ids (EOS included if the policy wrote it); int32 array.
        prompt_length: tokens of the prompt, at least 1; these are context only.
        weight: weight of its negative log-likelihood, finite and >= 0.
    """

    ids: np.ndarray
    prompt_length: int
    weight: float

    @property
    def completion_length(self) -> int:
        """Tokens of the completion."""
        return len(self.ids) - self.prompt_length


class MicroBatch(NamedTuple):
    """Rows that go through the model together.

    Attributes:
        input_ids: int64 [B, T].
        position_ids: int64 [B, T]; they restart at 0 with each sequence of a row, which is how
            transformers knows where attention must stop.
        target_index: int64 [N], the flat index b * T + t of each position whose next token is a
            completion token.
        target_ids: int64 [N], that next token.
        target_weights: float32 [N], the weight of the sequence it belongs to.
        target_lengths: int64 [N], tokens of the completion it belongs to.
    """

    input_ids: Tensor
    position_ids: Tensor
    target_index: Tensor
    target_ids: Tensor
    target_weights: Tensor
    target_lengths: Tensor


class StepBatch(NamedTuple):
    """One rank's share of one optimizer step.

    Attributes:
        micro_batches: as many on each rank; a rank without rows left gets padding.
        num_target_tokens: completion tokens of non-zero weight in the optimizer step, all ranks.
        num_sequences: sequences of non-zero weight in the optimizer step, all ranks.
    """

    micro_batches: list[MicroBatch]
    num_target_tokens: int
    num_sequences: int


def epoch_order(num_sequences: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the order of the sequences in one epoch, a function of its arguments alone."""
    return np.random.default_rng([seed, epoch]).permutation(num_sequences)


def pack_rows(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Returns indices of the sequences in each row: best fit decreasing, fullest row first.

    Args:
        lengths: tokens of each sequence, none more than row_tokens.
        row_tokens: most tokens of a row.
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, row), sorted: the first that fits fits best
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(free, (lengths[index], -1))
        if place < len(free):
            left, row = free.pop(place)
        else:
            left, row = row_tokens, len(rows)
            rows.append([])
        rows[row].append(index)
        insort(free, (left - lengths[index], row))
    return [rows[row] for _, row in free]


def pack_step(
    sequences: Sequence[TrainingSequence],
    *,
    row_tokens: int,
    tokens_per_micro_batch: int,
    rank: int = 0,
    num_ranks: int = 1,
) -> StepBatch:
    """Returns one rank's share of the optimizer step over the given sequences.

    Row r goes to rank r % num_ranks, so the ranks together see the rows that one rank would see.
    """
    rows = [
        [sequences[index] for index in row]
        for row in pack_rows([len(sequence.ids) for sequence in sequences], row_tokens)
    ]
    rows += [[]] * (-len(rows) % num_ranks)
    mine = rows[rank::num_ranks]
    num_rows = max(1, tokens_per_micro_batch // row_tokens)
    weighted = [sequence for sequence in sequences if sequence.weight > 0]
    return StepBatch(
        micro_batches=[_collate(mine[at : at + num_rows]) for at in range(0, len(mine), num_rows)],
        num_target_tokens=sum(sequence.completion_length for sequence in weighted),
        num_sequences=len(weighted),
    )


def _collate(rows: list[list[TrainingSequence]]) -> MicroBatch:
    """Lays rows side by side, as wide as the longest.

    Padding goes on with the last sequence's positions: causal attention hides it from that
    sequence, and rows that hold one sequence each then need no mask at all.
    """
    width = max([1, *(sum(len(sequence.ids) for sequence in row) for row in rows)])
    input_ids = np.zeros((len(rows), width), dtype=np.int64)
    position_ids = np.tile(np.arange(width), (len(rows), 1))
    targets: list[tuple[np.ndarray, ...]] = []
    for row_index, row in enumerate(rows):
        start = 0
        for sequence in row:
            end, count = start + len(sequence.ids), sequence.completion_length
            input_ids[row_index, start:end] = sequence.ids
            position_ids[row_index, start:] = np.arange(width - start)
            first = row_index * width + start + sequence.prompt_length - 1
            targets.append(
                (
                    np.arange(first, first + count),
                    sequence.ids[sequence.prompt_length :].astype(np.int64),
                    np.full(count, sequence.weight, dtype=np.float32),
                    np.full(count, count, dtype=np.int64),
                )
            )
            start = end
    empty = tuple(np.zeros(0, dtype) for dtype in (np.int64, np.int64, np.float32, np.int64))
    columns = zip(*(targets or [empty]), strict=True)
    index, ids, weights, lengths = (torch.from_numpy(np.concatenate(c)) for c in columns)
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        target_index=index,
        target_ids=ids,
        target_weights=weights,
        target_lengths=lengths,
    )
