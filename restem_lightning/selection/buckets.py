"""Rows of a pool by ranges of problems, of which memory holds one at a time."""

import math
import tempfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa

BUCKET_BYTES = 64 << 20
_WRITING = pa.ipc.IpcWriteOptions(compression="lz4")


class Buckets:
    """Rows added in any order, given back in ranges of problems in order of problem_id.

    Up to BUCKET_BYTES of them wait in memory; if there are more, all go to one file without a name,
    which the system removes however the process ends. So memory does not grow with the rows.
    """

    def __init__(
        self, problem_ids: pa.StringArray, num_rows: int, *, folder: Path | None = None
    ) -> None:
        """Holds nothing yet.

        Args:
            problem_ids: of the pool, sorted by code points.
            num_rows: of the pool, with those that are never added.
            folder: where the file lies, if one is needed; None for the system's.
        """
        self._problem_ids: pa.StringArray | None = problem_ids  # None once the ranges are known
        self._num_rows, self._folder = num_rows, folder
        self._waiting: list[pa.RecordBatch] = []
        self._waiting_bytes = self._num_read = 0
        self._firsts: Sequence[str] = ()  # the first problem of each range but the first one
        self._file: BinaryIO | None = None
        self._places: list[list[int]] = []  # of each range, where its pieces begin in the file

    def add(self, rows: pa.RecordBatch, *, out_of: int) -> None:
        """Adds rows with a column problem_id.

        Args:
            rows: of one schema at every call.
            out_of: how many rows of the pool were looked at for them.
        """
        self._waiting.append(rows)
        self._waiting_bytes += rows.nbytes
        self._num_read += out_of
        if self._waiting_bytes > BUCKET_BYTES:
            self._spill()

    def __iter__(self) -> Iterator[pa.Table]:
        """Yields the ranges; the rows of a range are in the order in which they were added."""
        if self._file is None:
            if self._waiting:
                yield pa.Table.from_batches(self._waiting)
            return
        self._spill()
        for places in self._places:
            if places:
                yield pa.concat_tables(self._read(place) for place in places)

    def _spill(self) -> None:
        """Moves what waits in memory to the file."""
        if not self._waiting:
            return
        if self._file is None:
            # If the rest of the pool is like its beginning, each range holds about BUCKET_BYTES.
            num_bytes = self._waiting_bytes * self._num_rows / self._num_read
            size = math.ceil(len(self._problem_ids) / math.ceil(num_bytes / BUCKET_BYTES))
            self._firsts, self._problem_ids = self._problem_ids[size::size].to_pylist(), None
            self._places = [[] for _ in range(len(self._firsts) + 1)]
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 (closed with self)
        table = pa.Table.from_batches(self._waiting)
        self._waiting, self._waiting_bytes = [], 0
        ids = table["problem_id"].combine_chunks().dictionary_encode()
        ranges = [bisect_right(self._firsts, one) for one in ids.dictionary.to_pylist()]
        numbers = np.array(ranges, dtype=np.int64)[ids.indices.to_numpy()]
        order = np.argsort(numbers, kind="stable")
        table = table.take(order)
        ends = np.searchsorted(numbers[order], range(len(self._places) + 1))
        for places, (start, stop) in zip(self._places, pairwise(ends.tolist()), strict=True):
            if start < stop:
                places.append(self._write(table.slice(start, stop - start)))

    def _write(self, table: pa.Table) -> int:
        """Appends a piece to the file and returns where it begins."""
        place = self._file.seek(0, 2)
        try:
            with pa.ipc.new_stream(self._file, table.schema, options=_WRITING) as writer:
                writer.write_table(table)
        except OSError as error:
            error.filename = str(self._folder)
            raise
        return place

    def _read(self, place: int) -> pa.Table:
        self._file.seek(place)
        return pa.ipc.open_stream(self._file).read_all()
