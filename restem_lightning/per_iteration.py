"""Settings that change from iteration to iteration."""

from typing import Any

from restem_lightning.errors import UserError

# What may change; the rest (problems, prompt, verifier, evaluation, ...) holds for the whole run.
GROUPS = (
    "start_from", "draw", "hint", "sampling", "selection", "mix", "balance", "model", "data",
    "trainer", "stop",
)  # fmt: skip
_GROWTH = ({"first", "times"}, {"first", "plus"})


def values_by_setting(per_iteration: dict[str, Any], known: Any) -> dict[str, Any]:
    """Returns dotted setting -> its values, for the setting `per_iteration`.

    Args:
        per_iteration: as in YAML, nested like the settings themselves.
        known: object that says by `in` whether there is such a setting.

    Raises:
        UserError: no such setting, one that holds for the whole run, or malformed values.
    """
    flat = dict(_leaves(per_iteration, ""))
    for key, values in flat.items():
        if key.split(".")[0] not in GROUPS or key not in known:
            raise UserError(
                f"per_iteration ({key}) must be a setting of one of {', '.join(GROUPS)}, such as "
                "{selection: {threshold: [0.0, 0.7]}}"
            )
        if not (isinstance(values, dict) or (isinstance(values, list) and values)):
            raise UserError(
                f"per_iteration.{key} ({values}) must be a list of values, or first with times or "
                "plus"
            )
    return flat


def value_at(values: list[Any] | dict[str, float], iteration: int) -> Any:
    """Returns the value of a setting in an iteration.

    Args:
        values: of iterations 1, 2, ..., the last one holds on; or {first, times} or {first, plus}
            for growth from iteration to iteration, rounded if `first` is a whole number.
        iteration: 1-based.
    """
    if isinstance(values, list):
        return values[min(iteration, len(values)) - 1]
    first, past = values["first"], iteration - 1
    value = first * values["times"] ** past if "times" in values else first + values["plus"] * past
    return round(value) if isinstance(first, int) else value


def _leaves(value: Any, key: str) -> list[tuple[str, Any]]:
    """Returns (dotted setting, values) of all settings below a key."""
    if not isinstance(value, dict) or set(value) in _GROWTH:
        return [(key, value)]
    return [
        leaf
        for name, item in value.items()
        for leaf in _leaves(item, f"{key}.{name}" if key else str(name))
    ]
