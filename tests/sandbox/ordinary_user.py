"""Runs a command as the user nobody: `python ordinary_user.py COMMAND...`, started by root.

Where the interpreter or this checkout lies below a folder that only root may enter, the command
sees that folder replaced by one that holds just them; nothing changes outside this process.
"""

import os
import sys
from pathlib import Path

from restem_lightning.sandbox.inside.kernel import (
    CLONE_NEWNS,
    MS_BIND,
    MS_PRIVATE,
    MS_REC,
    mount,
    unshare,
)

NOBODY = 65534


def closed_ancestor(path: Path) -> Path | None:
    """Returns the outermost folder on the way to `path` that other users may not enter."""
    ancestors = [folder for folder in reversed(path.parents) if not folder.stat().st_mode & 1]
    return ancestors[0] if ancestors else None


def open_ways(paths: list[Path]) -> None:
    """Makes paths reachable for everyone, for this process and its children only."""
    unshare(CLONE_NEWNS)
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    closed: dict[Path, list[Path]] = {}
    for path in dict.fromkeys(paths):
        if (folder := closed_ancestor(path)) is not None:
            closed.setdefault(folder, []).append(path)
    for folder, inner in closed.items():
        places = [os.open(path, os.O_PATH) for path in inner]
        mount("tmpfs", str(folder), "tmpfs", 0, "mode=755")
        for path, place in zip(inner, places, strict=True):
            path.mkdir(parents=True, exist_ok=True)
            os.fchdir(place)
            mount(".", str(path), "", MS_BIND | MS_REC)
    os.chdir("/")


def main() -> None:
    """Drops to nobody and runs the command."""
    root = Path(__file__).resolve().parents[2]
    folder = Path.cwd()
    open_ways([Path(sys.base_prefix).resolve(), Path(sys.prefix), root])
    os.chdir(folder)
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    os.environ["HOME"] = "/nonexistent"
    os.execv(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
