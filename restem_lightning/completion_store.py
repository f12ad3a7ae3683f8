"""A pool of completions on disk: parquet parts, each whole or not there."""

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from restem_lightning.completions import (
    SCHEMA,
    SCHEMA_METADATA,
    SCHEMA_VERSION,
    Completion,
    from_table,
    to_table,
)
from restem_lightning.errors import UserError
from restem_lightning.run_dir import (
    atomic_path,
    read_json,
    refuse_changes,
    settings_hash,
    sha256_of,
    write_json,
)

# Log-probabilities, token ids and texts hardly repeat: dictionaries of them cost time and space.
_REPEATED = [one.name for one in SCHEMA if one.name != "text" and not pa.types.is_list(one.type)]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One finished part of a pool, as its index entry records it.

    Args:
        index: number of the part; it is in the file's name.
        path: the parquet file; its index entry is beside it, ending in .json.
        num_rows: completions in it.
        sha256: hex digest of the file's bytes.
        num_problems: problems in it, each with all of its completions that were drawn.
    """

    index: int
    path: Path
    num_rows: int
    sha256: str
    num_problems: int

    @property
    def problem_ids(self) -> list[str]:
        """The problems in it, read anew from the index entry: a pool may hold many."""
        return read_json(self.path.with_suffix(".json"))["problem_ids"]


class CompletionStore:
    """A pool of completions on disk: numbered parquet parts, each with an index entry.

    A part is there once its index entry (part-00000.json) is; the entry is written last. So
    several processes can write different parts at the same time without a lock, and what a killed
    process leaves behind is not read.
    """

    def __init__(self, folder: str | Path) -> None:
        """Keeps the folder.

        Args:
            folder: the folder of the pool, created at the first write.
        """
        self.folder = Path(folder)

    def check_key(self, settings: dict[str, Any]) -> None:
        """Binds the pool to all that determines its content; call it before anything is written.

        Args:
            settings: JSON-serialisable; kept in pool.json at the first call, compared later.

        Raises:
            UserError: the pool was drawn with other settings; each difference is named.
        """
        path = self.folder / "pool.json"
        if path.exists():
            refuse_changes(
                read_json(path)["settings"],
                settings,
                begun=str(path),
                remedy="give another folder, or the old value",
            )
        else:
            write_json(path, {"settings": settings, "hash": settings_hash(settings)})

    def write_part(self, index: int, completions: Sequence[Completion]) -> Part:
        """Writes a part and then its index entry, both atomically.

        Args:
            index: number of the part, not finished before.
            completions: all completions of some problems, but for those that a quota spared.
        """
        assert completions, "a part without completions would never count as finished"
        for completion in completions:
            num_tokens = len(completion.completion_ids)
            assert num_tokens == len(completion.logprobs) == len(completion.sampling_logprobs)
        path, entry = self._part_path(index), self.entry_path(index)
        assert not entry.exists(), f"{path} is finished; delete_part comes first"
        with atomic_path(path) as temporary:
            table = to_table(completions)
            pq.write_table(table, temporary, compression="zstd", use_dictionary=_REPEATED)
            digest = sha256_of(temporary)
        problem_ids = list(dict.fromkeys(completion.problem_id for completion in completions))
        record = {"num_rows": len(completions), "sha256": digest, "problem_ids": problem_ids}
        write_json(entry, record)
        return _part(path, record)

    def parts(self) -> list[Part]:
        """Returns the finished parts in order of their index.

        Raises:
            UserError: a problem is in two parts, so its completions would count twice.
        """
        parts, hashes = [], array("q")  # 8 bytes of a problem in place of its id
        for entry in self.folder.glob("part-*.json"):
            record = read_json(entry)
            parts.append(_part(entry.with_suffix(".parquet"), record))
            hashes.extend(map(hash, record["problem_ids"]))
        if len(np.unique(hashes)) < len(hashes):
            _check_problems(parts)
        return sorted(parts, key=lambda part: part.index)

    def finished_problem_ids(self) -> set[str]:
        """Returns the problems whose completions are all on disk."""
        return {problem_id for part in self.parts() for problem_id in part.problem_ids}

    def delete_part(self, index: int) -> None:
        """Removes a part, its index entry first, so that its problems are drawn again."""
        self.entry_path(index).unlink(missing_ok=True)
        self._part_path(index).unlink(missing_ok=True)

    def verify_checksums(self) -> None:
        """Reads the bytes of every part once and compares them with the index.

        Raises:
            UserError: a part is missing or damaged.
        """
        for part in self.parts():
            with _part_errors(part):
                if sha256_of(part.path) != part.sha256:
                    raise _damaged(part, "its sha256 differs from the index")

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Returns all completions as one table, parts in order of their index.

        Args:
            columns: names to read, all by default; fewer columns take less memory.

        Raises:
            UserError: a part is missing, damaged or of another schema version.
        """
        names = SCHEMA.names if columns is None else columns
        schema = pa.schema([SCHEMA.field(name) for name in names], metadata=SCHEMA_METADATA)
        batches = (
            batch.replace_schema_metadata(SCHEMA_METADATA) for batch in self.iter_batches(names)
        )
        return pa.Table.from_batches(batches, schema=schema).unify_dictionaries()

    def iter_batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yields the completions in the order of `read`, a few thousand rows at a time.

        Raises:
            UserError: as `read`.
        """
        for part in self.parts():
            yield from _batches(part, columns)

    def iter_parts(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Yields the completions part by part, all of a problem's in one; raises as `read`."""
        for part in self.parts():
            yield pa.Table.from_batches(_batches(part, columns))

    def completions_of(self, problem_id: str) -> list[Completion]:
        """Returns one problem's completions, reading its part only; none if it is in no part.

        Raises:
            UserError: as `read`.
        """
        return [
            completion
            for part in self.parts()
            if problem_id in part.problem_ids
            for batch in _batches(part, SCHEMA.names)
            for completion in from_table(batch.filter(pc.field("problem_id") == problem_id))
        ]

    def entry_path(self, index: int) -> Path:
        """Returns the path of a part's index entry."""
        return self._part_path(index).with_suffix(".json")

    def _part_path(self, index: int) -> Path:
        return self.folder / f"part-{index:05d}.parquet"


def _part(path: Path, record: dict[str, Any]) -> Part:
    return Part(
        index=int(path.stem.removeprefix("part-")),
        path=path,
        num_rows=record["num_rows"],
        sha256=record["sha256"],
        num_problems=len(record["problem_ids"]),
    )


def _check_problems(parts: list[Part]) -> None:
    """Refuses parts that share a problem."""
    counts = Counter(problem_id for part in parts for problem_id in part.problem_ids)
    for problem_id, count in counts.items():
        if count > 1:
            names = [part.path.name for part in parts if problem_id in part.problem_ids]
            raise UserError(
                f"problem {problem_id!r} must be in one part of {parts[0].path.parent} and is in "
                f"{', '.join(sorted(names))}; delete all but one of them with their .json"
            )


def _batches(part: Part, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Yields the rows of a part."""
    with _part_errors(part), pq.ParquetFile(part.path) as file:
        version = (file.schema_arrow.metadata or {}).get(b"schema_version", b"none")
        if version.decode() != str(SCHEMA_VERSION):
            raise UserError(
                f"{part.path} has schema version {version.decode()}, this package reads "
                f"{SCHEMA_VERSION}; draw the pool again in another folder"
            )
        if file.metadata.num_rows != part.num_rows:
            raise _damaged(part, f"it has {file.metadata.num_rows} rows, not the index's")
        for batch in file.iter_batches(batch_size=4096, columns=list(columns)):
            yield batch.select(list(columns))


@contextmanager
def _part_errors(part: Part) -> Iterator[None]:
    """Turns what a missing or damaged file raises into a UserError with the remedy."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise _damaged(part, str(error).splitlines()[0]) from error


def _damaged(part: Part, reason: str) -> UserError:
    return UserError(
        f"{part.path} is missing or damaged ({reason}); delete it and "
        f"{part.path.with_suffix('.json').name} and run again: its problems are redrawn"
    )
