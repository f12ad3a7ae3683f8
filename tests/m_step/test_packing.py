import numpy as np
import pytest
import torch

from restem_lightning.m_step.packing import TrainingSequence, epoch_order, pack_step


def sequences(lengths, prompt_length=1):
    ids = np.arange(1, 1 + sum(lengths), dtype=np.int32)
    parts = np.split(ids, np.cumsum(lengths)[:-1])
    return [TrainingSequence(part, prompt_length, 1.0) for part in parts]


def sequence(prompt, completion, weight=1.0):
    return TrainingSequence(np.array([*prompt, *completion], np.int32), len(prompt), weight)


def related(seed=0):
    """Sequences whose prompts share beginnings of all kinds."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(12):
        prompt = [7] * 20 if rng.random() < 0.8 else []
        prompt += [int(rng.integers(2, 4))] * int(rng.integers(1, 40)) + [9] * int(rng.integers(3))
        for _ in range(rng.integers(1, 4)):
            found.append(sequence(prompt, rng.integers(2, 99, rng.integers(1, 6)).tolist()))
    return found


def unpacked(batch):
    """Every sequence as its completion's tokens see it: (ids, positions, target), sorted."""
    rows = []
    for micro_batch in batch.micro_batches:
        segments = micro_batch.segments
        ids, positions = micro_batch.input_ids[0], micro_batch.position_ids[0]
        key_index = torch.arange(len(ids)) if segments.key_index is None else segments.key_index
        for index, target in zip(micro_batch.target_index, micro_batch.target_ids, strict=True):
            place = torch.searchsorted(segments.query_ends, index, right=True) - 1
            keys = key_index[segments.key_ends[place] : segments.key_ends[place + 1]]
            seen = keys[: len(keys) - (segments.query_ends[place + 1] - index - 1)]
            assert seen[-1] == index
            assert positions[seen].tolist() == list(range(len(seen)))
            rows.append((*ids[seen].tolist(), target.item()))
    return sorted(rows)


def test_epochs_have_their_own_order_and_a_seed_repeats_it():
    first, second = epoch_order(50, 3, 0), epoch_order(50, 3, 1)
    assert not np.array_equal(first, second)
    assert np.array_equal(first, epoch_order(50, 3, 0))
    assert not np.array_equal(first, epoch_order(50, 4, 0))


def test_the_order_of_an_epoch_is_numpys_permutation_in_half_its_memory():
    order = epoch_order(3000, 3, 1)
    assert np.array_equal(order, np.random.default_rng([3, 1]).permutation(3000))
    assert order.dtype == np.int32


def test_targets_are_the_completion_tokens_after_the_position_before_them():
    batch = pack_step(sequences([5, 3], prompt_length=2), tokens_per_micro_batch=9)
    (micro_batch,) = batch.micro_batches
    assert micro_batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert micro_batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]]
    assert micro_batch.target_ids.tolist() == [3, 4, 5, 8]
    assert micro_batch.target_index.tolist() == [1, 2, 3, 6]
    assert micro_batch.target_lengths.tolist() == [3, 3, 3, 1]
    assert micro_batch.segments.key_index is None
    assert (batch.num_target_tokens, batch.num_sequences) == (4, 2)


def test_completions_of_one_problem_stand_behind_one_copy_of_its_prompt():
    data = [sequence([5, 6, 7], [10, 11]), sequence([5, 6, 7], [12]), sequence([5, 6, 7], [10, 13])]
    (micro_batch,) = pack_step(data, tokens_per_micro_batch=99).micro_batches
    assert sorted(micro_batch.input_ids[0].tolist()) == [5, 6, 7, 10, 10, 11, 12, 13]
    ends = micro_batch.segments.query_ends.tolist()
    prompts = [i for i, ids in enumerate(micro_batch.input_ids[0].tolist()) if ids == 5]
    assert len(prompts) == 1
    assert ends == [0, *np.cumsum(micro_batch.segments.query_lengths).tolist()]
    # The last token of the prompt is before the first token of each completion.
    assert micro_batch.target_index.tolist().count(prompts[0] + 2) == 3


def test_a_preamble_of_all_problems_is_there_once():
    data = [sequence([3] * 32 + [20 + i] * 8, [40 + i] * 5) for i in range(6)]
    (shared,) = pack_step(data, tokens_per_micro_batch=999).micro_batches
    (plain,) = pack_step(data, tokens_per_micro_batch=999, shared_prompts=False).micro_batches
    assert shared.input_ids.shape[1] == 32 + 6 * 13
    assert plain.input_ids.shape[1] == 6 * 45


@pytest.mark.parametrize("tokens_per_micro_batch", [1, 60, 200, 10_000])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_each_target_sees_its_own_sequence_and_nothing_else(seed, tokens_per_micro_batch):
    data = related(seed)
    expected = sorted(
        tuple(one.ids[: at + 1].tolist())
        for one in data
        for at in range(one.prompt_length, len(one.ids))
    )
    for shared in (True, False):
        batch = pack_step(
            data, tokens_per_micro_batch=tokens_per_micro_batch, shared_prompts=shared
        )
        assert unpacked(batch) == expected
        most = max(tokens_per_micro_batch, *(len(one.ids) for one in data))
        assert max(m.input_ids.shape[1] for m in batch.micro_batches) <= most


def test_ranks_share_the_sequences_of_one_rank_and_get_equally_many_micro_batches():
    data = related()
    alone = pack_step(data, tokens_per_micro_batch=100)
    shares = [
        pack_step(data, tokens_per_micro_batch=100, rank=rank, num_ranks=4) for rank in range(4)
    ]
    together = sorted(row for share in shares for row in unpacked(share))
    assert together == unpacked(alone)
    assert len({len(share.micro_batches) for share in shares}) == 1
    assert {share.num_target_tokens for share in shares} == {alone.num_target_tokens}


def test_ranks_get_even_shares_of_what_one_micro_batch_would_hold():
    data = sequences([10] * 10)
    shares = [
        pack_step(data, tokens_per_micro_batch=4096, rank=rank, num_ranks=4) for rank in range(4)
    ]
    sizes = [m.input_ids.shape[1] for share in shares for m in share.micro_batches]
    assert sizes == [30, 30, 30, 10]


def test_a_rank_without_sequences_gets_a_micro_batch_without_targets():
    shares = [
        pack_step(sequences([5]), tokens_per_micro_batch=9, rank=rank, num_ranks=2)
        for rank in range(2)
    ]
    (idle,) = shares[1].micro_batches
    assert (len(idle.target_ids), len(shares[0].micro_batches)) == (0, 1)
