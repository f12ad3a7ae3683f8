"""Problems whose answers can be checked: the record, JSONL files, data sets, and generators."""

from restem_lightning.problems.code import APPS, MBPP, HumanEval
from restem_lightning.problems.functions import FunctionProblems
from restem_lightning.problems.math import GSM8K, MATH
from restem_lightning.problems.procedural import ReasoningGym
from restem_lightning.problems.records import (
    JsonlProblems,
    Problem,
    ProblemSource,
    check_splits,
    read_problems,
    without_questions_of,
    write_problems,
)
from restem_lightning.problems.words import WordProblems

__all__ = [
    "APPS",
    "GSM8K",
    "MATH",
    "MBPP",
    "FunctionProblems",
    "HumanEval",
    "JsonlProblems",
    "Problem",
    "ProblemSource",
    "ReasoningGym",
    "WordProblems",
    "check_splits",
    "read_problems",
    "without_questions_of",
    "write_problems",
]
