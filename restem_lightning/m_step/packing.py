"""Packing: sequences -> micro-batches of one optimizer step, prompts shared. Pure and seeded.

A micro-batch is one row of tokens made of segments. A segment attends to the segments before it
in its own sequences and to itself, so that a piece of a prompt that several sequences begin with
is there once and still each sequence sees exactly its own tokens.

Shape legend: T tokens of a micro-batch, S segments, K key rows of all segments, N target tokens.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Prompts that differ inside are shared in whole blocks: a segment of a few tokens costs more than
# it saves.
SHARED_BLOCK = 16


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
    def prompt(self) -> np.ndarray:
        """Ids of the prompt."""
        return self.ids[: self.prompt_length]

    @property
    def completion_length(self) -> int:
        """Tokens of the completion."""
        return len(self.ids) - self.prompt_length


class Segments(NamedTuple):
    """What each token of a micro-batch sees.

    Attributes:
        key_index: int64 [K], for one segment after the other the tokens that it sees, by position;
            its own come last. None if each segment sees itself only.
        query_ends: int32 [S + 1], where the segments end among the tokens, from 0 on.
        key_ends: int32 [S + 1], where they end in key_index, from 0 on.
        query_lengths: tokens of each segment.
        key_lengths: tokens that each segment sees, all together.
    """

    key_index: Tensor | None
    query_ends: Tensor
    key_ends: Tensor
    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]


class MicroBatch(NamedTuple):
    """Tokens that go through the model together.

    Attributes:
        input_ids: int64 [1, T].
        position_ids: int64 [1, T], positions in the sequence: those of a completion go on after
            its prompt.
        segments: what each token sees.
        target_index: int64 [N], each token whose next one is a completion token; the last token of
            a shared prompt is there once for each completion.
        target_ids: int64 [N], that next token.
        target_weights: float32 [N], the weight of the sequence it belongs to.
        target_lengths: int64 [N], tokens of the completion it belongs to.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: Segments
    target_index: Tensor
    target_ids: Tensor
    target_weights: Tensor
    target_lengths: Tensor


class StepBatch(NamedTuple):
    """One rank's share of one optimizer step.

    Attributes:
        micro_batches: as many on each rank; a rank without sequences left gets one idle token.
        num_target_tokens: completion tokens of non-zero weight in the optimizer step, all ranks.
        num_sequences: sequences of non-zero weight in the optimizer step, all ranks.
    """

    micro_batches: list[MicroBatch]
    num_target_tokens: int
    num_sequences: int


def epoch_order(num_sequences: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the order of the sequences in one epoch, a function of its arguments alone; int32."""
    order = np.arange(num_sequences, dtype=np.int32)  # 4 bytes each, and there may be many
    np.random.default_rng([seed, epoch]).shuffle(order)
    return order


def prompt_order(sequences: Sequence[TrainingSequence]) -> list[int]:
    """Returns the indices of sequences by prompt, the order in which `pack_step` shares prompts."""
    keys = [sequence.prompt.astype(">i4").tobytes() for sequence in sequences]
    return sorted(range(len(sequences)), key=keys.__getitem__)


def pack_step(
    sequences: Sequence[TrainingSequence],
    *,
    tokens_per_micro_batch: int,
    shared_prompts: bool = True,
    rank: int = 0,
    num_ranks: int = 1,
) -> StepBatch:
    """Returns one rank's share of the optimizer step over the given sequences.

    All ranks get as many micro-batches, of as even a size as whole sequences allow. What is shared
    and how the sequences are cut into micro-batches changes what is computed how often, never what.

    Args:
        sequences: of the optimizer step, all ranks.
        tokens_per_micro_batch: most tokens of one; a single sequence may have more.
        shared_prompts: whether what prompts begin with alike is there once in a micro-batch.
        rank: whose share.
        num_ranks: of the data-parallel group.
    """
    if shared_prompts:
        sequences = [sequences[index] for index in prompt_order(sequences)]
        pairs = pairwise(sequences)
        overlaps = [0, *(_overlap(one.prompt, other.prompt) for one, other in pairs)]
    else:
        overlaps = [0] * len(sequences)
    cuts = _cut_evenly(
        [len(one.ids) for one in sequences], overlaps, tokens_per_micro_batch, num_ranks
    )
    per_rank = math.ceil(len(cuts) / num_ranks)
    mine = cuts[rank::num_ranks]
    mine += [range(0)] * (per_rank - len(mine))
    weighted = [sequence for sequence in sequences if sequence.weight > 0]
    return StepBatch(
        micro_batches=[
            _collate([sequences[i] for i in cut], [overlaps[i] for i in cut]) for cut in mine
        ],
        num_target_tokens=sum(sequence.completion_length for sequence in weighted),
        num_sequences=len(weighted),
    )


def to_device(micro_batch: MicroBatch, device: torch.device) -> MicroBatch:
    """Returns the micro-batch with its tensors on a device."""
    ids, positions, segments, *targets = micro_batch
    moved = [each.to(device) if isinstance(each, Tensor) else each for each in segments]
    return MicroBatch(
        ids.to(device), positions.to(device), Segments(*moved), *(t.to(device) for t in targets)
    )


def _overlap(one: np.ndarray, other: np.ndarray) -> int:
    """Returns how many tokens two prompts share: all of them, or whole blocks."""
    size = min(len(one), len(other))
    differ = np.flatnonzero(one[:size] != other[:size])
    if len(differ) == 0:
        return size
    return int(differ[0]) // SHARED_BLOCK * SHARED_BLOCK


def _cut_evenly(
    lengths: list[int], overlaps: list[int], most: int, multiple_of: int
) -> list[range]:
    """Returns consecutive ranges of at most `most` tokens, as few and then as even as may be.

    Their number is a multiple of `multiple_of`, or less where there are too few sequences.
    """
    wanted = math.ceil(len(_cut(lengths, overlaps, most)) / multiple_of) * multiple_of
    low, high = 0, max(most, *lengths)  # more than low is needed, high is enough
    while high - low > 1:
        middle = (low + high) // 2
        if len(_cut(lengths, overlaps, middle)) <= wanted:
            high = middle
        else:
            low = middle
    return _cut(lengths, overlaps, high)


def _cut(lengths: list[int], overlaps: list[int], most: int) -> list[range]:
    starts, tokens = [], 0
    for index, (length, overlap) in enumerate(zip(lengths, overlaps, strict=True)):
        tokens += length - overlap
        if not starts or tokens > most:
            starts.append(index)
            tokens = length
    return [range(*pair) for pair in zip(starts, [*starts[1:], len(lengths)], strict=True)]


class _Segment:
    """A piece of one or more sequences: tokens [start, end) of a sequence, after its parent."""

    def __init__(self, sequence: TrainingSequence, start: int, parent: "_Segment | None"):
        self.sequence, self.start, self.parent = sequence, start, parent
        self.end = len(sequence.ids)
        self.offset = 0  # of its first token in the micro-batch

    def path(self) -> list["_Segment"]:
        """This segment after all that come before it."""
        return [*(self.parent.path() if self.parent else []), self]

    def split(self, at: int) -> "_Segment":
        """Cuts off what is before a position and returns it, the new parent."""
        before = _Segment(self.sequence, self.start, self.parent)
        before.end = self.start = at
        self.parent = before
        return before


def _make_segments(
    sequences: list[TrainingSequence], overlaps: list[int]
) -> tuple[list[_Segment], list[_Segment]]:
    """Returns all segments, and the last one of each sequence.

    Args:
        sequences: so ordered that what two of them share is the least overlap between them.
        overlaps: tokens that each shares with the one before it; the first one's is ignored.
    """
    segments: list[_Segment] = []
    leaves: list[_Segment] = []
    for sequence, overlap in zip(sequences, overlaps, strict=True):
        parent = leaves[-1] if leaves and overlap else None
        while parent is not None and parent.start >= overlap:
            parent = parent.parent
        if parent is not None and parent.end > overlap:
            parent = parent.split(overlap)
            segments.append(parent)
        leaves.append(_Segment(sequence, overlap if parent else 0, parent))
        segments.append(leaves[-1])
    return segments, leaves


def _collate(sequences: list[TrainingSequence], overlaps: list[int]) -> MicroBatch:
    """Lays the segments of a micro-batch one after the other."""
    if not sequences:  # this rank has nothing left, but takes part in what the ranks do together
        sequences, overlaps = [TrainingSequence(np.zeros(1, np.int32), 1, 0.0)], [0]
    segments, leaves = _make_segments(sequences, overlaps)
    offset = 0
    for segment in segments:
        segment.offset = offset
        offset += segment.end - segment.start
    ids = [segment.sequence.ids[segment.start : segment.end] for segment in segments]
    positions = [np.arange(segment.start, segment.end) for segment in segments]
    return MicroBatch(
        torch.from_numpy(np.concatenate(ids).astype(np.int64))[None],
        torch.from_numpy(np.concatenate(positions))[None],
        _layout(segments),
        *_targets(sequences, leaves),
    )


def _layout(segments: list[_Segment]) -> Segments:
    rows = [
        np.concatenate([np.arange(s.offset, s.offset + s.end - s.start) for s in segment.path()])
        for segment in segments
    ]
    queries = [segment.end - segment.start for segment in segments]
    keys = [len(row) for row in rows]
    shared = any(segment.parent for segment in segments)
    ends = [np.cumsum([0, *lengths], dtype=np.int32) for lengths in (queries, keys)]
    return Segments(
        torch.from_numpy(np.concatenate(rows)) if shared else None,
        *(torch.from_numpy(each) for each in ends),
        tuple(queries),
        tuple(keys),
    )


def _targets(sequences: list[TrainingSequence], leaves: list[_Segment]) -> list[Tensor]:
    """Returns index, ids, weights and lengths of the targets."""
    columns: list[tuple[np.ndarray, ...]] = []
    for sequence, leaf in zip(sequences, leaves, strict=True):
        count = sequence.completion_length
        before = np.arange(sequence.prompt_length, len(sequence.ids)) - 1
        index = leaf.offset - leaf.start + before
        if count and leaf.start == sequence.prompt_length:  # all of the prompt is shared
            index[0] = leaf.parent.offset + leaf.parent.end - leaf.parent.start - 1
        columns.append(
            (
                index,
                sequence.ids[sequence.prompt_length :].astype(np.int64),
                np.full(count, sequence.weight, dtype=np.float32),
                np.full(count, count, dtype=np.int64),
            )
        )
    return [torch.from_numpy(np.concatenate(column)) for column in zip(*columns, strict=True)]
