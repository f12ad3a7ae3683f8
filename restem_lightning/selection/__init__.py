"""The accepted dataset: which completions the M-step trains on, as a pure function of the pool."""

from restem_lightning.selection.accepted import (
    ACCEPTED_SCHEMA,
    ROW_GROUP,
    end_with_eos,
    iter_accepted,
    write_accepted,
)
from restem_lightning.selection.balance import balance_score
from restem_lightning.selection.funnel import empty_reason
from restem_lightning.selection.params import SelectionParams
from restem_lightning.selection.rules import dedupe_key, is_acceptable, limit_of, passes
from restem_lightning.selection.select import (
    HINT,
    Selection,
    select_completions,
    solved_problems,
    stream_accepted,
)

__all__ = [
    "ACCEPTED_SCHEMA",
    "HINT",
    "ROW_GROUP",
    "Selection",
    "SelectionParams",
    "balance_score",
    "dedupe_key",
    "empty_reason",
    "end_with_eos",
    "is_acceptable",
    "iter_accepted",
    "limit_of",
    "passes",
    "select_completions",
    "solved_problems",
    "stream_accepted",
    "write_accepted",
]
