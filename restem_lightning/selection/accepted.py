"""The accepted dataset as a table and a file."""

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from restem_lightning.completions import SCHEMA_METADATA, SCHEMA_VERSION
from restem_lightning.errors import UserError
from restem_lightning.run_dir import atomic_path

ROW_GROUP = 4096
# An iteration with a manifest is finished, and not looked at again.
_ANEW = "delete it and manifest.json beside it and run again: it is selected anew from the pool"
# Of a human solution, `iteration` is 0 and `logprobs` is empty.
ACCEPTED_SCHEMA = pa.schema(
    [
        ("iteration", pa.int32()),
        ("problem_id", pa.string()),
        ("completion_index", pa.int32()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion_ids", pa.list_(pa.int32())),
        ("text", pa.string()),
        ("logprobs", pa.list_(pa.float32())),
        ("weight", pa.float32()),
    ],
    metadata=SCHEMA_METADATA,
)


def end_with_eos(
    accepted: pa.Table, eos_ids: Collection[int], *, only: np.ndarray | bool = True
) -> pa.Table:
    """Returns an accepted dataset whose completions all end with EOS, so that training shows it.

    Completions that a stop string ended were cut before it and have no EOS of their own. The added
    EOS has no log-probability: `logprobs` stays as drawn.

    Args:
        accepted: table of ACCEPTED_SCHEMA, or another one with `completion_ids`.
        eos_ids: the policy's EOS token ids, the one to add first; empty for none.
        only: of each row whether it may get one.
    """
    if not eos_ids:
        return accepted
    column = accepted["completion_ids"].combine_chunks()
    ids, lengths = column.flatten().to_numpy(), column.value_lengths().to_numpy()
    ends, lacks_eos = np.cumsum(lengths), np.ones(len(lengths), dtype=bool)
    some = lengths > 0
    lacks_eos[some] = ~np.isin(ids[ends[some] - 1], list(eos_ids))
    lacks_eos &= only
    ids = np.insert(ids, ends[lacks_eos], next(iter(eos_ids)))
    offsets = np.concatenate([[0], np.cumsum(lengths + lacks_eos)])
    ended = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(ids, pa.int32()))
    place = accepted.schema.get_field_index("completion_ids")
    return accepted.set_column(place, accepted.schema.field(place), ended)


def write_accepted(path: str | Path, tables: Iterable[pa.Table]) -> int:
    """Writes an accepted dataset atomically, piece by piece, and returns its number of rows.

    The same rows give the same bytes, however they are cut into tables. Each page has a checksum.
    """
    num_rows, options = 0, {"compression": "zstd", "write_page_checksum": True}
    with (
        atomic_path(path) as temporary,
        pq.ParquetWriter(temporary, ACCEPTED_SCHEMA, **options) as writer,
    ):
        for group in _row_groups(tables):
            writer.write_table(group)
            num_rows += group.num_rows
    return num_rows


def _row_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Yields the rows of all tables, ROW_GROUP at a time."""
    left = ACCEPTED_SCHEMA.empty_table()
    for table in tables:
        assert table.schema.equals(ACCEPTED_SCHEMA)
        left = pa.concat_tables([left, table])
        while left.num_rows >= ROW_GROUP:
            yield left.slice(0, ROW_GROUP).combine_chunks()
            left = left.slice(ROW_GROUP)
    if left.num_rows:
        yield left.combine_chunks()


def iter_accepted(path: str | Path) -> Iterator[pa.Table]:
    """Yields an accepted dataset in pieces.

    Raises:
        UserError: the file is missing, damaged or of another schema version.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            schema = file.schema_arrow
            version = (schema.metadata or {}).get(b"schema_version", b"none").decode()
            if version != str(SCHEMA_VERSION) or not schema.equals(ACCEPTED_SCHEMA):
                raise UserError(
                    f"{path} must be an accepted dataset of schema version {SCHEMA_VERSION}, found "
                    f"version {version}; {_ANEW}"
                )
            for number in range(file.num_row_groups):
                yield file.read_row_group(number)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is missing or damaged ({str(error).splitlines()[0]}); {_ANEW}"
        ) from error
