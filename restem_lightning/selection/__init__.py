"""The accepted dataset: which completions the M-step trains on, as a pure function of the pool."""

from restem_lightning.selection.accepted import (
    ACCEPTED_SCHEMA,
    end_with_eos,
    read_accepted,
    write_accepted,
)
from restem_lightning.selection.balance import balance_score
from restem_lightning.selection.funnel import empty_reason
from restem_lightning.selection.params import SelectionParams
from restem_lightning.selection.rules import dedupe_key, is_acceptable, limit_of, passes
from restem_lightning.selection.select import HINT, Selection, select_completions, solved_problems

__all__ = [
    "ACCEPTED_SCHEMA",
    "HINT",
    "Selection",
    "SelectionParams",
    "balance_score",
    "dedupe_key",
    "empty_reason",
    "end_with_eos",
    "is_acceptable",
    "limit_of",
    "passes",
    "read_accepted",
    "select_completions",
    "solved_problems",
    "write_accepted",
]
