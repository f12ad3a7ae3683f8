import numpy as np
import torch

from restem_lightning.m_step.packing import TrainingSequence, epoch_order, pack_rows, pack_step


def sequences(lengths, prompt_length=1):
    ids = np.arange(1, 1 + sum(lengths), dtype=np.int32)
    parts = np.split(ids, np.cumsum(lengths)[:-1])
    return [TrainingSequence(part, prompt_length, 1.0) for part in parts]


def test_pack_rows_takes_the_row_with_the_least_room_that_fits():
    rows = pack_rows([7, 6, 3, 2, 2], 10)
    assert rows == [[0, 2], [1, 3, 4]]


def test_pack_rows_holds_each_sequence_once_within_the_limit():
    lengths = np.random.default_rng(0).integers(1, 50, 200).tolist()
    rows = pack_rows(lengths, 64)
    assert sorted(index for row in rows for index in row) == list(range(200))
    assert max(sum(lengths[index] for index in row) for row in rows) <= 64
    assert len(rows) <= 1.05 * sum(lengths) / 64 + 1


def test_epochs_have_their_own_order_and_a_seed_repeats_it():
    first, second = epoch_order(50, 3, 0), epoch_order(50, 3, 1)
    assert not np.array_equal(first, second)
    assert np.array_equal(first, epoch_order(50, 3, 0))
    assert not np.array_equal(first, epoch_order(50, 4, 0))


def test_targets_are_the_completion_tokens_after_the_position_before_them():
    batch = pack_step(sequences([5, 3], prompt_length=2), row_tokens=9, tokens_per_micro_batch=9)
    (micro_batch,) = batch.micro_batches
    assert micro_batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert micro_batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]]
    assert micro_batch.target_ids.tolist() == [3, 4, 5, 8]
    assert micro_batch.target_index.tolist() == [1, 2, 3, 6]
    assert micro_batch.target_lengths.tolist() == [3, 3, 3, 1]
    assert (batch.num_target_tokens, batch.num_sequences) == (4, 2)


def test_ranks_share_the_rows_of_one_rank_and_get_equally_many_micro_batches():
    data = sequences([9, 8, 7, 6, 5, 4, 3])
    settings = {"row_tokens": 10, "tokens_per_micro_batch": 10}
    alone = pack_step(data, **settings)
    shares = [pack_step(data, **settings, rank=rank, num_ranks=4) for rank in range(4)]

    def targets(batches):
        return sorted(torch.cat([m.target_ids for b in batches for m in b.micro_batches]).tolist())

    assert targets([alone]) == targets(shares)
    assert {len(share.micro_batches) for share in shares} == {2}
    assert {share.num_target_tokens for share in shares} == {alone.num_target_tokens}
