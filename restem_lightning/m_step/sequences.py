"""Sequences to train on, in files: in memory are those in use."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from restem_lightning.errors import UserError
from restem_lightning.m_step.packing import TrainingSequence
from restem_lightning.run_dir import atomic_path

_COLUMNS = ["prompt_ids", "completion_ids", "weight"]
BATCH_ROWS = 1024
_ID_BYTES = np.dtype(np.int32).itemsize
# Where a sequence lies in the file of token ids. Neighbours of one problem share their prompt.
_INDEX = np.dtype(
    [
        ("prompt_start", np.int64),
        ("completion_start", np.int64),
        ("prompt_length", np.int32),
        ("completion_length", np.int32),
        ("weight", np.float32),
    ]
)


class StoredSequences(Sequence[TrainingSequence]):
    """The sequences of an accepted dataset in file order, none of which is in memory."""

    def __init__(self, accepted: str | Path, rows: range | np.ndarray) -> None:
        """Takes what `write_sequences` has left.

        Args:
            accepted: parquet file of the accepted dataset.
            rows: of that file, which sequences.
        """
        self._ids_path, self._index_path = _paths(accepted)
        self._rows = rows

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self._rows)

    def __getitem__(self, place: int) -> TrainingSequence:
        """Reads a sequence; between reads the files are closed, so they can be replaced."""
        offset = int(self._rows[place]) * _INDEX.itemsize
        (entry,) = np.fromfile(self._index_path, _INDEX, 1, offset=offset)
        prompt, completion, prompt_length, completion_length, weight = entry.item()
        with open(self._ids_path, "rb") as file:
            file.seek(prompt * _ID_BYTES)
            prompt_ids = np.fromfile(file, np.int32, prompt_length)
            file.seek(completion * _ID_BYTES)
            completion_ids = np.fromfile(file, np.int32, completion_length)
        return TrainingSequence(np.concatenate([prompt_ids, completion_ids]), prompt_length, weight)


def sequence_lengths(accepted: str | Path) -> np.ndarray:
    """Returns the tokens of every sequence that `write_sequences` has left, int32."""
    path, size = _paths(accepted)[1], BATCH_ROWS * _INDEX.itemsize
    starts = range(0, path.stat().st_size, size)
    pieces = (np.fromfile(path, _INDEX, BATCH_ROWS, offset=start) for start in starts)
    return np.concatenate([one["prompt_length"] + one["completion_length"] for one in pieces])


def write_sequences(accepted: str | Path) -> None:
    """Writes token ids and index of an accepted dataset beside it, reading it in pieces.

    Raises:
        UserError: if the file or a column is missing, no row is there, or a row cannot be trained
            on.
    """
    if not Path(accepted).is_file():
        raise UserError(f"accepted ({accepted}) must be a parquet file; run the E-step first")
    with _read_errors(accepted):
        missing = set(_COLUMNS) - set(pq.read_schema(accepted).names)
    if missing:
        raise UserError(f"accepted ({accepted}) must have the columns {_COLUMNS}; add {missing}")
    store_sequences(accepted, _batches(accepted))


def store_sequences(accepted: str | Path, batches: Iterable[pa.RecordBatch]) -> None:
    """Writes token ids and index of sequences beside a path; as `write_sequences`.

    Args:
        accepted: the path.
        batches: with the columns prompt_ids, completion_ids and weight.
    """
    ids_path, index_path = _paths(accepted)
    num_rows, num_tokens, any_weight = 0, 0, False
    last, last_start = np.zeros(0, np.int32), 0
    with (
        atomic_path(ids_path) as ids_temporary,
        atomic_path(index_path) as index_temporary,
        open(ids_temporary, "wb") as ids_file,
        open(index_temporary, "wb") as index_file,
    ):
        for batch in batches:
            prompts, completions = (_token_lists(batch[name]) for name in _COLUMNS[:2])
            weights, index = batch["weight"].to_pylist(), []
            for prompt, completion, weight in zip(prompts, completions, weights, strict=True):
                _check(accepted, num_rows, prompt, completion, weight)
                if not np.array_equal(prompt, last):
                    last, last_start = prompt, num_tokens
                    ids_file.write(prompt.tobytes())
                    num_tokens += len(prompt)
                ids_file.write(completion.tobytes())
                index.append((last_start, num_tokens, len(prompt), len(completion), weight))
                num_tokens += len(completion)
                num_rows += 1
            any_weight = any_weight or any(weights)
            np.array(index, _INDEX).tofile(index_file)
        if num_rows == 0:
            raise UserError(
                f"accepted ({accepted}) holds 0 completions, at least 1 is needed; sample more"
                " completions per problem, use easier problems or a better prompt"
            )
        if not any_weight:
            raise UserError(f"all weights of accepted ({accepted}) are 0; at least 1 must be more")


def remove_sequences(accepted: str | Path) -> None:
    """Deletes what `write_sequences` has left; it is made anew from the accepted dataset."""
    for path in _paths(accepted):
        path.unlink(missing_ok=True)


def _paths(accepted: str | Path) -> tuple[Path, Path]:
    """Returns the files of token ids and index."""
    return Path(accepted).with_suffix(".ids"), Path(accepted).with_suffix(".index")


def _batches(accepted: str | Path) -> Iterator[pa.RecordBatch]:
    with _read_errors(accepted), pq.ParquetFile(accepted, page_checksum_verification=True) as file:
        for number in range(file.num_row_groups):  # one reader over all keeps what it has read
            for batch in file.iter_batches(BATCH_ROWS, row_groups=[number], columns=_COLUMNS):
                if batch.num_rows:
                    yield batch


@contextmanager
def _read_errors(accepted: str | Path) -> Iterator[None]:
    """Turns what a damaged file raises into a UserError with the remedy."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"accepted ({accepted}) is damaged ({str(error).splitlines()[0]}); delete it and give "
            "the same command again: it is selected anew from the pool"
        ) from error


def _token_lists(column: pa.ListArray) -> list[np.ndarray]:
    """Views of each row's int32 ids, without one Python object per token."""
    values = column.flatten().to_numpy().astype(np.int32, copy=False)
    ends = np.cumsum(column.value_lengths().to_numpy(zero_copy_only=False))
    return np.split(values, ends[:-1])


def _check(
    accepted: str | Path, row: int, prompt: np.ndarray, completion: np.ndarray, weight: float
) -> None:
    """Checks that a row can be trained on."""
    if len(prompt) == 0 or len(completion) == 0:
        raise UserError(
            f"row {row} of accepted ({accepted}) has {len(prompt)} prompt and {len(completion)}"
            " completion tokens, each must be at least 1; drop it or add BOS to the prompt"
        )
    if not (math.isfinite(weight) and weight >= 0):
        raise UserError(
            f"weight ({weight}) in row {row} of accepted ({accepted}) must be finite and >= 0;"
            " mend the weighting"
        )
