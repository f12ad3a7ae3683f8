"""Quota: how many of a problem's completions must be drawn to know which are accepted."""

import json
from collections.abc import Hashable, Iterable, Sequence

from restem_lightning.completion_store import CompletionStore
from restem_lightning.completions import Completion
from restem_lightning.errors import UserError
from restem_lightning.selection import SelectionParams, dedupe_key, is_acceptable, limit_of


def check_quota(selection: SelectionParams, *, num_pools: int = 1) -> None:
    """Checks that drawing may stop at the quota without changing the accepted dataset.

    Args:
        selection: the settings.
        num_pools: pools of an E-step that are united, that of a hint among them.

    Raises:
        UserError: each further completion could change it, or there is no quota.
    """
    if selection.select != "first":
        raise UserError(
            f"selection.select ({selection.select}) chooses among all completions, so "
            "e_step.stop_at_quota would change the accepted dataset; set selection.select to "
            "first, or e_step.stop_at_quota to false"
        )
    for name, neutral in (("rewards", "verdict"), ("min_total", None), ("random_control", False),
                          ("dedupe_keep", "first")):  # fmt: skip
        if (value := getattr(selection, name)) != neutral:
            raise UserError(
                f"selection.{name} ({value}) looks at all completions of a problem; set it to "
                f"{json.dumps(neutral)}, or e_step.stop_at_quota to false"
            )
    if selection.max_per_problem is None:
        raise UserError(
            "selection.max_per_problem (null) must be a number with e_step.stop_at_quota; set it, "
            "or e_step.stop_at_quota to false"
        )
    if selection.quota == "fail_rate" and num_pools > 1:
        raise UserError(
            f"selection.quota (fail_rate) goes by the first completions of all {num_pools} pools "
            "(draw.policies, hint); draw one pool, or set e_step.stop_at_quota to false"
        )


def next_indices(
    drawn: Sequence[Completion], n: int, quota: SelectionParams | None = None
) -> tuple[int, ...]:
    """Returns which completions of a problem to draw next; none if nothing more can be accepted.

    "first" accepts the distinct correct completions of the lowest indices. If 0 .. m-1 hold as many
    of them as the quota, whatever lies behind is not looked at, so it need not be drawn. What comes
    next depends on nothing but 0 .. m-1, so how a run goes changes no pool.

    Args:
        drawn: the completions 0 .. m-1 with their verdicts.
        n: completions of a problem at most.
        quota: settings that `check_quota` lets pass, None to draw all n at once.
    """
    if quota is None:
        return tuple(range(len(drawn), n))
    fails = [not is_acceptable(one, quota.threshold) for one in drawn]
    good = {_key(one, quota) for one, fail in zip(drawn, fails, strict=True) if not fail}
    num_accepted = len(good)
    if quota.quota == "fail_rate" and len(drawn) < quota.probe:
        return tuple(range(len(drawn), min(n, quota.probe)))
    num_missing = limit_of(fails, quota, quota.max_per_problem) - num_accepted
    if num_missing <= 0:
        return ()
    # As many as will do if the rest is like what was drawn.
    num_next = num_missing
    if drawn:
        num_next = -(-num_missing * len(drawn) // max(1, num_accepted))
    return tuple(range(len(drawn), min(n, len(drawn) + num_next)))


def count_skipped(stores: Iterable[CompletionStore], n: int) -> int:
    """Returns how many completions were not drawn because of the quota.

    Args:
        stores: the pools of an E-step.
        n: completions per problem of a pool without a quota.
    """
    parts = (part for store in stores for part in store.parts())
    return sum(part.num_problems * n - part.num_rows for part in parts)


def _key(completion: Completion, quota: SelectionParams) -> Hashable:
    if quota.dedupe == "none":
        return completion.completion_index
    return dedupe_key(quota.dedupe)(completion.text)
