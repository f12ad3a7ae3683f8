"""The journal of a run's tracking: all that was ever sent, so that it can be sent again."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One thing to be sent.

    Args:
        step: 0, 1, 2, ... over all restarts; W&B's own step.
        time: seconds since 1970.
        key: what it is, unique within the run, e.g. iteration/2.
        values: numbers by name; of tables and artifacts the content lies in the run folder.
    """

    step: int
    time: float
    key: str
    values: dict[str, float]


class Journal:
    """A JSON-lines file that only grows; a line torn by a kill is dropped."""

    def __init__(self, path: Path) -> None:
        """Reads the file, if it is there."""
        self.path, self.entries = path, []
        if path.exists():
            whole, _, torn = path.read_bytes().rpartition(b"\n")
            if torn:
                path.write_bytes(whole + b"\n" if whole else b"")
            self.entries = [Entry(**json.loads(line)) for line in whole.splitlines()]
        self._keys = {entry.key for entry in self.entries}

    def __contains__(self, key: str) -> bool:
        """Returns whether there is an entry of this key."""
        return key in self._keys

    def append(self, key: str, values: dict[str, Any]) -> Entry:
        """Writes and returns a new entry."""
        entry = Entry(step=len(self.entries), time=time.time(), key=key, values=values)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(entry)) + "\n")
        self.entries.append(entry)
        self._keys.add(key)
        return entry
