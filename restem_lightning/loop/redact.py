"""Settings without their secrets, for all that leaves the machine."""

import re
from typing import Any

HIDDEN = "***"
_NAME_PART = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z]+")
_SECRET_PARTS = {"secret", "password", "passwd", "passphrase", "apikey"}
_SECRET_ENDS = _SECRET_PARTS | {
    "token",
    "tokens",
    "key",
    "keys",
    "credential",
    "credentials",
    "auth",
}
# Prefixes of access tokens in common use, and user:password in a URL.
_SECRET_TEXT = re.compile(
    r"\b(?:hf_|sk-|ghp_|github_pat_|glpat-|xox[a-z]-|AKIA)[\w-]{12,}|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)


def redact(value: Any, *, name: str = "") -> Any:
    """Returns a copy of settings in which no text is a secret by its name or its form.

    Numbers stay: `max_new_tokens` is none.

    Args:
        value: JSON-like settings.
        name: the key that they stand behind.
    """
    if isinstance(value, dict):
        return {key: redact(item, name=key) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(item, name=name) for item in value]
    if not isinstance(value, str) or not value:
        return value
    return HIDDEN if _is_secret(name) else _SECRET_TEXT.sub(HIDDEN, value)


def _is_secret(name: str) -> bool:
    parts = [part.lower().rstrip("s") for part in _NAME_PART.findall(name)]
    return bool(parts) and (parts[-1] in _SECRET_ENDS or not _SECRET_PARTS.isdisjoint(parts))
