"""Verdicts and completions: what the E-step records about everything that a policy wrote."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import pyarrow as pa

from restem_lightning import __version__

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
