"""Verdicts and completions: what the E-step records about everything that a policy wrote."""

import dataclasses
import math
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from restem_lightning import __version__
from restem_lightning.errors import UserError
from restem_lightning.run_dir import (
    atomic_path,
    read_json,
    refuse_changes,
    settings_hash,
    sha256_of,
    write_json,
)

SCHEMA_VERSION = 3
SCHEMA_METADATA = {
    "schema_version": str(SCHEMA_VERSION),
    "written_by": f"restem_lightning {__version__}",
}
_FEW_VALUES = pa.dictionary(pa.int32(), pa.string())
SCHEMA = pa.schema(
    [
        ("iteration", pa.int32()),
        ("problem_id", pa.string()),
        ("completion_index", pa.int32()),
        ("seed", pa.int64()),
        ("purpose", _FEW_VALUES),
        ("prompt_ids", pa.list_(pa.int32())),
        ("num_shared", pa.int32()),
        ("completion_ids", pa.list_(pa.int32())),
        ("text", pa.string()),
        ("logprobs", pa.list_(pa.float32())),
        ("sampling_logprobs", pa.list_(pa.float32())),
        ("finish_reason", _FEW_VALUES),
        ("policy_hash", _FEW_VALUES),
        ("sampling", _FEW_VALUES),
        ("engine", _FEW_VALUES),
        ("verdict", _FEW_VALUES),
        ("reward", pa.float64()),
        ("extracted", pa.string()),
        ("detail", pa.string()),
        ("verify_s", pa.float32()),
        ("verifier", _FEW_VALUES),
    ],
    metadata=SCHEMA_METADATA,
)

# Log-probabilities, token ids and texts hardly repeat: dictionaries of them cost time and space.
_REPEATED = [one.name for one in SCHEMA if one.name != "text" and not pa.types.is_list(one.type)]


class VerdictKind(str, Enum):
    """What a verifier says of one completion."""

    CORRECT = "CORRECT"
    WRONG = "WRONG"
    NO_ANSWER = "NO_ANSWER"
    TIMEOUT = "TIMEOUT"
    ERROR = "ERROR"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The outcome of verifying one completion.

    Args:
        kind: CORRECT, WRONG, NO_ANSWER (no answer in the declared format), TIMEOUT or ERROR (the
            verifier itself failed).
        reward: any finite number; if not given 1.0 for CORRECT, else 0.0 (the binary reward of
            arXiv 2312.06585, section 3). Selection and D_val go by it, evaluation by the kind.
        extracted: the answer found in the completion, None if there is none.
        detail: the reason in a few words, for people.
        elapsed_s: seconds that the verifier took.
    """

    kind: VerdictKind
    reward: float = None  # type: ignore[assignment]
    extracted: str | None = None
    detail: str = ""
    elapsed_s: float = 0.0

    def __post_init__(self) -> None:
        """Fills in the binary reward.

        Raises:
            ValueError: the reward is not a finite number.
        """
        if self.reward is None:
            object.__setattr__(self, "reward", float(self.kind is VerdictKind.CORRECT))
        elif not math.isfinite(self.reward):
            raise ValueError(f"reward ({self.reward}) must be finite; the verifier must mend it")


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One sampled completion with its address, its tokens and its verdict.

    It holds all that draws it again but the policy's weights: `restem sample --replay` does so.

    Args:
        iteration: the iteration whose E-step drew it (0 for an evaluation of the base model).
        problem_id: the problem it answers.
        completion_index: 0 .. n-1 within the problem.
        seed: the run's seed; (seed, iteration, purpose, problem_id, completion_index, position)
            addresses each draw.
        prompt_ids: token ids of the prompt that the policy saw.
        completion_ids: token ids that the policy wrote, EOS included if it wrote one; the last one
            may go on with the first characters of the stop string.
        text: the completion as text, cut before the stop string if one ended it.
        logprobs: per completion token, log-probability under the policy at T=1, untruncated.
        sampling_logprobs: the same under the distribution that was drawn from.
        finish_reason: "eos", "stop" (a stop string) or "length" (truncated).
        policy_hash: hash of the policy's weights.
        sampling: JSON of the sampling settings.
        purpose: "" for the E-step; tells draws of an evaluation from those, see `Stage`.
        num_shared: how many of prompt_ids the sampler took for the preamble of all prompts; it
            computes these apart, which shows in the last bits of the log-probabilities.
        engine: JSON of how the sampler used the machine, with the device and dtype that it chose.
        verdict: what the verifier said.
        verifier: name and version of the verifier, e.g. "math/1".
    """

    iteration: int
    problem_id: str
    completion_index: int
    seed: int
    prompt_ids: list[int]
    completion_ids: list[int]
    text: str
    logprobs: list[float]
    sampling_logprobs: list[float]
    finish_reason: str
    policy_hash: str
    sampling: str
    purpose: str = ""
    num_shared: int = 0
    engine: str = "{}"
    verdict: Verdict = field(default_factory=lambda: Verdict(kind=VerdictKind.ERROR))
    verifier: str = ""

    def with_verdict(self, verdict: Verdict) -> "Completion":
        """Returns the same completion with a verdict."""
        return dataclasses.replace(self, verdict=verdict)


def to_table(completions: Sequence[Completion]) -> pa.Table:
    """Returns completions as a table of SCHEMA, one row each, in the same order."""
    return pa.Table.from_pylist([_to_row(completion) for completion in completions], schema=SCHEMA)


def from_table(table: pa.Table | pa.RecordBatch) -> list[Completion]:
    """Returns the completions of a table that has all columns of SCHEMA."""
    return [_from_row(row) for row in table.select(SCHEMA.names).to_pylist()]


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


def _to_row(completion: Completion) -> dict[str, Any]:
    row = {name: value for name, value in vars(completion).items() if name != "verdict"}
    verdict = completion.verdict
    return row | {
        "verdict": verdict.kind.value,
        "reward": verdict.reward,
        "extracted": verdict.extracted,
        "detail": verdict.detail,
        "verify_s": verdict.elapsed_s,
    }


def _from_row(row: dict[str, Any]) -> Completion:
    verdict = Verdict(
        kind=VerdictKind(row["verdict"]),
        reward=row["reward"],
        extracted=row["extracted"],
        detail=row["detail"],
        elapsed_s=row["verify_s"],
    )
    verdict_columns = ("verdict", "reward", "extracted", "detail", "verify_s")
    fields = {name: value for name, value in row.items() if name not in verdict_columns}
    return Completion(**fields, verdict=verdict)
