"""The journal of a run's tracking, all that was ever sent, and the thread that sends it."""

import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
                os.truncate(path, len(whole) + bool(whole))
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


class Mirror:
    """The thread that sends entries, so that the loop never waits for W&B."""

    def __init__(self, send: Callable[[Entry], None], entries: list[Entry]) -> None:
        """Starts sending.

        Args:
            send: sends one entry; what it raises costs a line, not the run.
            entries: what to send first.
        """
        self._send, self._queue = send, queue.SimpleQueue()
        for entry in entries:
            self.put(entry)
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def put(self, entry: Entry) -> None:
        """Takes an entry; returns at once."""
        self._queue.put(entry)

    def close(self, timeout_s: float) -> None:
        """Waits for what is under way, but not longer."""
        self._queue.put(None)
        self._thread.join(timeout_s)

    def _work(self) -> None:
        while (entry := self._queue.get()) is not None:
            with warned(entry.key):
                self._send(entry)


@contextmanager
def warned(what: str) -> Iterator[None]:
    """Turns whatever W&B raises into one line: watching a run must never stop it."""
    try:
        yield
    except Exception as error:  # of any kind: W&B raises its own, OSError, ValueError, ...
        say(f"W&B: {what} failed ({type(error).__name__}: {error}); the run folder has it all")


def say(text: str) -> None:
    """Tells the user something in one line."""
    print(f"restem fit: {text}", file=sys.stderr)
