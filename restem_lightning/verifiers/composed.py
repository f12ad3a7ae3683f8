"""Verifiers made of others: all, any, weighted, or another one in each iteration."""

import json
from collections.abc import Mapping
from typing import Any, Literal, get_args

from restem_lightning.completions import Verdict, VerdictKind
from restem_lightning.errors import UserError
from restem_lightning.problems import Problem
from restem_lightning.verifiers.base import verifier_spec

Rule = Literal["all", "any", "weighted", "by_iteration"]
ITERATION = "e_step_iteration"  # in a problem's metadata, while an E-step draws
_MAX_DETAIL = 60  # characters of a part's own detail
# Of verdicts that are not CORRECT, which one speaks for all: a broken part must show.
_GRAVEST = (VerdictKind.ERROR, VerdictKind.TIMEOUT, VerdictKind.WRONG, VerdictKind.NO_ANSWER)


class ComposedVerifier:
    """Several verifiers as one; every part's verdict stands in `detail`, as JSON."""

    def __init__(
        self,
        parts: dict[str, Any],
        rule: str = "all",
        weights: dict[str, float] | None = None,
        threshold: float = 0.5,
    ) -> None:
        """Judges by several verifiers.

        Args:
            parts: verifiers by a name of your own, each as the setting `verifier` takes it. Their
                order counts: the first one that finds an answer gives `extracted`.
            rule: all: CORRECT if every part says so; any: if one does; weighted: the reward is the
                weighted mean of the parts' rewards, and CORRECT is a reward above the threshold;
                by_iteration: each part's name is the iteration that it begins with ("1", "3"), and
                the last one judges D_val and evaluation in every iteration.
            weights: with weighted, of each part; at least 0, not all 0.
            threshold: with weighted, the reward that CORRECT must be above.

        Raises:
            UserError: an argument is not allowed.
        """
        if rule not in get_args(Rule):
            raise UserError(f"rule ({rule}) must be one of {', '.join(get_args(Rule))}; choose one")
        if not parts:
            raise UserError("parts ({}) must name at least one verifier")
        if rule == "by_iteration" and not ("1" in parts and all(n.isdecimal() for n in parts)):
            raise UserError(f"parts ({', '.join(parts)}) must be iterations that begin with 1")
        if (rule == "weighted") != (weights is not None) or set(weights or parts) != set(parts):
            raise UserError(
                f"weights ({weights}) must be given for weighted alone, one for each of "
                f"{', '.join(parts)}"
            )
        if weights is not None and (min(weights.values()) < 0 or sum(weights.values()) == 0):
            raise UserError(f"weights ({weights}) must be at least 0 and not all 0; mend them")
        self._rule, self._weights, self._threshold = rule, weights or {}, threshold
        self._parts = {name: verifier_spec(part).build() for name, part in parts.items()}
        self.name = rule
        of_parts = [f"{n}={part.name}/{part.version}" for n, part in self._parts.items()]
        how = f"{json.dumps(self._weights)}>{threshold:g}" if weights else ""
        self.version = f"1({', '.join(of_parts)}){how}"

    def warm_up(self) -> None:
        """Warms up every part that wants it."""
        for part in self._parts.values():
            getattr(part, "warm_up", lambda: None)()

    def cache_key(self, problem: Problem, completion_text: str) -> tuple[Any, ...] | None:
        """Returns the parts' keys; None if one of them has none."""
        keys = []
        for name, part in self._in_force(problem).items():
            key = part.cache_key(problem, completion_text) if hasattr(part, "cache_key") else None
            if key is None:
                return None
            keys.append((name, *key))
        return tuple(keys)

    def verify(self, problem: Problem, completion_text: str) -> Verdict:
        """Returns the verdict of all parts together."""
        verdicts = {}
        for name, part in self._in_force(problem).items():
            try:
                verdicts[name] = part.verify(problem, completion_text)
            except Exception as error:  # the part's failure is its verdict, and is counted
                reason = f"{type(error).__name__}: {error}"
                verdicts[name] = Verdict(kind=VerdictKind.ERROR, detail=reason)
        rule = "all" if self._rule == "by_iteration" else self._rule
        return compose(verdicts, rule, weights=self._weights, threshold=self._threshold)

    def reference_completion(self, problem: Problem) -> str | None:
        """Returns that of the first part that has one."""
        texts = (part.reference_completion(problem) for part in self._in_force(problem).values())
        return next((text for text in texts if text is not None), None)

    def _in_force(self, problem: Problem) -> dict[str, Any]:
        """Returns the parts that judge now."""
        if self._rule != "by_iteration":
            return self._parts
        now = problem.metadata.get(ITERATION)
        begun = [name for name in self._parts if now is None or int(name) <= now]
        last = max(begun, key=int)
        return {last: self._parts[last]}


def compose(
    verdicts: Mapping[str, Verdict],
    rule: str,
    *,
    weights: Mapping[str, float],
    threshold: float,
) -> Verdict:
    """Returns one verdict for several; see `ComposedVerifier`.

    With `weighted` any ERROR or TIMEOUT stays one: what was not judged has no mean.
    """
    kinds = [verdict.kind for verdict in verdicts.values()]
    num_correct, reward = kinds.count(VerdictKind.CORRECT), None
    gravest = next((kind for kind in _GRAVEST if kind in kinds), VerdictKind.CORRECT)
    if rule == "weighted":
        total = sum(weights[name] * verdict.reward for name, verdict in verdicts.items())
        reward = total / sum(weights.values())
        kind = VerdictKind.CORRECT if reward > threshold else VerdictKind.WRONG
        if gravest in _GRAVEST[:2]:
            kind, reward = gravest, None
    else:
        enough = len(kinds) if rule == "all" else 1
        kind = VerdictKind.CORRECT if num_correct >= enough else gravest
    extracted = (v.extracted for v in verdicts.values() if v.extracted is not None)
    return Verdict(
        kind=kind, reward=reward, extracted=next(extracted, None), detail=_detail(verdicts)
    )


def _detail(verdicts: Mapping[str, Verdict]) -> str:
    """Returns name -> [kind, reward, detail] as JSON."""
    parts = {
        name: [verdict.kind.value, round(verdict.reward, 4), verdict.detail[:_MAX_DETAIL]]
        for name, verdict in verdicts.items()
    }
    return json.dumps(parts)
