"""Records that tests of several rooms build, with what a test does not care about filled in."""

from typing import Any

from restem_lightning.completions import Completion, Verdict, VerdictKind


def make_completion(kind: VerdictKind = VerdictKind.ERROR, **fields: Any) -> Completion:
    """Returns a completion of one token behind a prompt of one, with these fields set instead.

    Args:
        kind: of its verdict, if `fields` hold no `verdict`.
        fields: of `Completion`; of log-probabilities that they leave out each is -1.
    """
    drawn = {
        "iteration": 1,
        "problem_id": "p",
        "completion_index": 0,
        "seed": 0,
        "prompt_ids": [1],
        "completion_ids": [2],
        "text": "t",
        "finish_reason": "eos",
        "policy_hash": "abc",
        "sampling": "{}",
        "verdict": Verdict(kind=kind),
    } | fields
    logprobs = [-1.0] * len(drawn["completion_ids"])
    return Completion(**{"logprobs": logprobs, "sampling_logprobs": logprobs} | drawn)
