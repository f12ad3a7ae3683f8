import numpy as np
import pytest
import torch

from restem_lightning.errors import UserError
from restem_lightning.m_step import AcceptedDataModule, sequences
from restem_lightning.m_step.packing import TrainingSequence, pack_step
from restem_lightning.m_step.step_loader import StepLoader


def batches(loader):
    return [m.input_ids for batch in loader for m in batch.micro_batches]


def test_rows_are_read_as_written_weights_and_eos_included(make_accepted):
    path = make_accepted([([5, 6], [7, 1], 2.0), ([8], [9, 10, 1], 0.5)])
    (batch,) = AcceptedDataModule(str(path)).train_dataloader()
    (micro_batch,) = batch.micro_batches
    targets, weights = micro_batch.target_ids.tolist(), micro_batch.target_weights.tolist()
    assert sorted(zip(targets, weights, strict=True)) == [
        (1, 0.5),
        (1, 2.0),
        (7, 2.0),
        (9, 0.5),
        (10, 0.5),
    ]


def test_empty_accepted_dataset_is_refused(make_accepted):
    with pytest.raises(UserError, match="0 completions"):
        AcceptedDataModule(str(make_accepted([]))).train_dataloader()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (([], [3, 1], 1.0), "0 prompt"),
        (([3], [], 1.0), "0 completion"),
        (([3], [1], -1.0), "weight"),
        (([3], [1], float("nan")), "weight"),
        (([3], [1], 0.0), "all weights"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_refused(make_accepted, row, message):
    with pytest.raises(UserError, match=message):
        AcceptedDataModule(str(make_accepted([row]))).train_dataloader()


def test_missing_file_and_missing_setting_are_refused(tmp_path):
    with pytest.raises(UserError, match="parquet"):
        AcceptedDataModule(str(tmp_path / "nothing.parquet")).train_dataloader()
    with pytest.raises(UserError, match="accepted"):
        AcceptedDataModule().train_dataloader()
    with pytest.raises(UserError, match="batch_size"):
        AcceptedDataModule(batch_size=0)


def test_sequences_longer_than_a_row_are_dropped_with_a_count(make_accepted):
    path = make_accepted([([2] * 9, [1], 1.0), ([2], [1], 1.0)])
    with pytest.warns(UserWarning, match="drops 1 of 2"):
        loader = AcceptedDataModule(str(path), max_sequence_tokens=5).train_dataloader()
    assert loader.num_items == 1
    with pytest.raises(UserError, match="raise it to 10"):
        AcceptedDataModule(
            str(make_accepted([([2] * 9, [1], 1.0)])), max_sequence_tokens=5
        ).train_dataloader()


def test_loader_shuffles_each_epoch_and_repeats_under_one_seed(make_accepted):
    path = str(make_accepted())
    loader = AcceptedDataModule(path, batch_size=8).train_dataloader()
    first, second = batches(loader), batches(loader)
    again = batches(AcceptedDataModule(path, batch_size=8).train_dataloader())
    assert len(loader) == 3
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_loader_goes_on_at_the_saved_place_and_into_the_next_epoch(make_accepted):
    module = AcceptedDataModule(str(make_accepted()), batch_size=8)
    loader, resumed = module.train_dataloader(), module.train_dataloader()
    next(iter(loader))
    resumed.load_state_dict(loader.state_dict())
    for _ in range(2):
        for left, right in zip(batches(loader), batches(resumed), strict=True):
            assert torch.equal(left, right)
    assert loader.state_dict() == resumed.state_dict() == {"epoch": 2, "next_step": 1}


def test_batches_from_the_file_are_those_of_sequences_in_memory(make_accepted, monkeypatch):
    monkeypatch.setattr(sequences, "BATCH_ROWS", 4)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 64, rng.integers(1, 9)).tolist() for _ in range(5)]
    rows = [
        (prompts[place // 6], rng.integers(2, 64, rng.integers(1, 9)).tolist(), place % 3 / 2)
        for place in range(30)
    ]
    mapped = AcceptedDataModule(str(make_accepted(rows)), batch_size=8).train_dataloader()
    held = [TrainingSequence(np.array(p + c, np.int32), len(p), weight) for p, c, weight in rows]
    steps = StepLoader(
        len(held),
        lambda numbers: pack_step(
            [held[number] for number in numbers],
            tokens_per_micro_batch=4096,
            shared_prompts=True,
            rank=0,
            num_ranks=1,
        ),
        batch_size=8,
        seed=0,
    )
    for _ in range(2):
        for one, other in zip(mapped, steps, strict=True):
            assert one[1:] == other[1:]
            for left, right in zip(one.micro_batches, other.micro_batches, strict=True):
                assert left.segments[3:] == right.segments[3:]
                for tensor, expected in zip(
                    (*left[:2], *left[3:]), (*right[:2], *right[3:]), strict=True
                ):
                    assert torch.equal(tensor, expected)


def test_neighbours_share_their_prompt_in_the_file(make_accepted):
    path = make_accepted([([5, 6], [7], 1.0), ([5, 6], [8, 9], 1.0), ([5], [6], 1.0)])
    AcceptedDataModule(str(path)).train_dataloader()
    ids = np.fromfile(path.with_suffix(".ids"), np.int32)
    assert ids.tolist() == [5, 6, 7, 8, 9, 5, 6]
    sequences.remove_sequences(path)
    assert sorted(path.parent.iterdir()) == [path]
