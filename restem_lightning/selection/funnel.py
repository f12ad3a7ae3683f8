"""What a funnel tells a person."""

from typing import Any


def empty_reason(funnel: dict[str, Any]) -> str:
    """Returns which stage of a funnel left nothing to train on, and what to try, in one line."""
    total, verdicts = funnel["completions"], funnel["verdicts"]
    if total == 0:
        return "no completion was drawn; check that the problem source yields problems"
    for kind, remedy in (
        ("ERROR", "the verifier itself fails: see the column `detail` of the pool and mend it"),
        ("TIMEOUT", "raise the verifier's time limit or lower its number of workers"),
    ):
        if verdicts.get(kind, 0) > total / 2:
            return f"{verdicts[kind]} of {total} verdicts are {kind}; {remedy}"
    if funnel["not_truncated"] == 0:
        return f"all {total} completions are truncated; raise sampling.max_new_tokens"
    if verdicts.get("CORRECT", 0) > 0 and funnel["correct"] == 0:
        return (
            f"all {verdicts['CORRECT']} correct completions are truncated; raise "
            "sampling.max_new_tokens"
        )
    if verdicts.get("NO_ANSWER", 0) > total / 2:
        return (
            f"none of {total} completions is correct and {verdicts['NO_ANSWER']} have no answer "
            "in the verifier's format; change the prompt so that it shows the format"
        )
    if funnel["correct"] == 0:
        return (
            f"none of {total} completions is correct; draw more per problem (sampling.n), raise "
            "sampling.temperature, change the prompt, or check the verifier"
        )
    return f"the dataset is not empty: {funnel['accepted']} of {total} completions are accepted"
