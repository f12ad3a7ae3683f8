"""The accepted dataset as a table and a file."""

from collections.abc import Collection
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from restem_lightning.completions import SCHEMA_METADATA, SCHEMA_VERSION
from restem_lightning.errors import UserError
from restem_lightning.run_dir import atomic_path

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


def end_with_eos(accepted: pa.Table, eos_ids: Collection[int]) -> pa.Table:
    """Returns an accepted dataset whose completions all end with EOS, so that training shows it.

    Completions that a stop string ended were cut before it and have no EOS of their own. The added
    EOS has no log-probability: `logprobs` stays as drawn.

    Args:
        accepted: table of ACCEPTED_SCHEMA.
        eos_ids: the policy's EOS token ids, the one to add first; empty for none.
    """
    if not eos_ids:
        return accepted
    column = accepted["completion_ids"].combine_chunks()
    ids, lengths = column.flatten().to_numpy(), column.value_lengths().to_numpy()
    ends, lacks_eos = np.cumsum(lengths), np.ones(len(lengths), dtype=bool)
    some = lengths > 0
    lacks_eos[some] = ~np.isin(ids[ends[some] - 1], list(eos_ids))
    ids = np.insert(ids, ends[lacks_eos], next(iter(eos_ids)))
    offsets = np.concatenate([[0], np.cumsum(lengths + lacks_eos)])
    ended = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(ids, pa.int32()))
    return with_column(accepted, "completion_ids", ended)


def with_column(accepted: pa.Table, name: str, values: list | pa.Array) -> pa.Table:
    """Returns an accepted dataset with other values in one column."""
    place = ACCEPTED_SCHEMA.get_field_index(name)
    field = ACCEPTED_SCHEMA.field(place)
    return accepted.set_column(place, field, pa.array(values, type=field.type))


def write_accepted(path: str | Path, table: pa.Table) -> None:
    """Writes an accepted dataset atomically; the same table gives the same bytes."""
    assert table.schema.equals(ACCEPTED_SCHEMA)
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_accepted(path: str | Path) -> pa.Table:
    """Returns an accepted dataset.

    Raises:
        UserError: the file is missing, damaged or of another schema version.
    """
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path} is missing or damaged ({str(error).splitlines()[0]}); delete it and run "
            "again: it is selected anew from the pool"
        ) from error
    version = (table.schema.metadata or {}).get(b"schema_version", b"none").decode()
    if version != str(SCHEMA_VERSION) or not table.schema.equals(ACCEPTED_SCHEMA):
        raise UserError(
            f"{path} must be an accepted dataset of schema version {SCHEMA_VERSION}, found "
            f"version {version}; delete it and run again: it is selected anew from the pool"
        )
    return table
