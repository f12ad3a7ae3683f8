"""The settings of a selection."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from restem_lightning.errors import UserError

Rewards = Literal["verdict", "majority"]
Threshold = float | Literal["correct", "none"]
Quota = Literal["uniform", "fail_rate"]
Select = Literal["first", "random", "diverse", "max_reward"]
Dedupe = Literal["none", "exact", "normalized", "equations"]
Keep = Literal["first", "farthest"]
Weight = Literal["uniform", "reward", "exponential"]


@dataclass(frozen=True, kw_only=True)
class SelectionParams:
    """Which completions enter the accepted dataset, with which weight; truncated ones never do.

    Args:
        rewards: where rewards come from: "verdict" (the verifier), or "majority": 1 for the
            completions whose answer is the most frequent one of their problem (a tie goes to the
            one that occurs first), else 0. The second needs no reference answers.
        threshold: "correct" accepts what the verifier calls CORRECT and pays for (reward above 0);
            a number accepts every reward above it, whatever the verdict; "none" accepts all. With
            the binary reward each number from 0 to below 1 means "correct". ERROR is never
            accepted.
        max_per_problem: most completions accepted per problem, at least 1; null for no limit. It
            keeps easy problems from dominating (10 in arXiv 2312.06585, section 5).
        min_total: max_per_problem is raised, for all problems alike, until so many completions are
            accepted or no more are left; null to leave it.
        quota: "uniform", or "fail_rate": the limit of a problem is max_per_problem times the share
            of its first `probe` completions that do not pass the threshold, rounded, at least 1.
        probe: of quota fail_rate; at least 1.
        select: which ones, where a problem has more: "first" (lowest completion_index), "random"
            (seeded, independent for each problem), "diverse" (the first one, then always the one
            whose set of words is farthest from those taken) or "max_reward" (ties as "first").
        dedupe: which completions of a problem count as the same, so that only one of them can be
            accepted: "none", "exact" (same text), "normalized" (same but for case, white space and
            spaces beside punctuation) or "equations" (same list of equations such as 3 + 4 = 7 or
            <<3+4=7>>; "normalized" for a text without equations).
        dedupe_keep: which one of the same is kept: "first", or "farthest", the one with the largest
            sum of edit distances to the others kept (one pass in order of completion_index).
        random_control: accept as many completions of each problem as the other settings do, but
            drawn at random from all that are not truncated, whatever their reward.
        weight: of an accepted completion in the loss: "uniform" (1), "reward", or "exponential",
            exp(reward / beta).
        beta: of weight exponential; above 0.
        seed: of all that is random; any integer.
    """

    rewards: Rewards = "verdict"
    threshold: Threshold = "correct"
    max_per_problem: int | None = 10
    min_total: int | None = None
    quota: Quota = "uniform"
    probe: int = 32
    select: Select = "first"
    dedupe: Dedupe = "none"
    dedupe_keep: Keep = "first"
    random_control: bool = False
    weight: Weight = "uniform"
    beta: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            UserError: a value is not allowed.
        """
        if self.max_per_problem is not None and self.max_per_problem < 1:
            raise UserError(
                f"max_per_problem ({self.max_per_problem}) must be at least 1, or null for no "
                "limit; the default is 10"
            )
        if self.quota == "fail_rate" and self.max_per_problem is None:
            raise UserError("max_per_problem (null) must be a number with quota fail_rate; set it")
        if self.probe < 1 or (self.min_total is not None and self.min_total < 1):
            raise UserError(f"probe ({self.probe}) and min_total ({self.min_total}) must be >= 1")
        if not self.beta > 0:
            raise UserError(f"beta ({self.beta}) must be above 0")
        if not isinstance(self.threshold, int | float):
            _check("threshold", self.threshold, ("correct", "none"), "a number, ")
        for name, kind in (
            ("rewards", Rewards), ("quota", Quota), ("select", Select), ("dedupe", Dedupe),
            ("dedupe_keep", Keep), ("weight", Weight),
        ):  # fmt: skip
            _check(name, getattr(self, name), get_args(kind))


def _check(name: str, value: Any, allowed: tuple[str, ...], besides: str = "") -> None:
    if value not in allowed:
        raise UserError(f"{name} ({value!r}) must be {besides}one of {', '.join(allowed)}; set one")
