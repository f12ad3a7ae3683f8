"""Runs every cheat and attack at one level: `python attack_run.py LEVEL`; prints what got through.

The output is one JSON object: `num_programs`, and `breaches`, which must be empty.
"""

import json
import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path

from attacks import ATTACKS, program
from cheats import CHEATS, TESTS

from restem_lightning.sandbox import Runner

CPU_S = 0.3
HONEST = "def add(a, b): return a + b"
# Where programs share the caller's file system, these are what the level does not promise.
BY_DESIGN = {
    "namespaces": (),
    "landlock": (),
    "seccomp": (
        "read the canary", "climb with dots", "read the users", "read homes",
        "environment of the parent", "command line of the caller", "processes in /proc",
        "find problems on disk",
    ),
}  # fmt: skip


def processes() -> set[int]:
    """Returns the ids of all processes but threads of the kernel's."""
    return {int(name) for name in os.listdir("/proc") if name.isdigit()}


def descendants() -> set[int]:
    """Returns the ids of all processes below this one."""
    children: dict[int, list[int]] = {}
    for pid in processes():
        try:
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(pid)
    found, waiting = set(), [os.getpid()]
    while waiting:
        new = children.get(waiting.pop(), [])
        found.update(new)
        waiting += new
    return found


def has_visitor(listener: socket.socket) -> bool:
    """Returns whether somebody has connected."""
    listener.setblocking(False)
    try:
        listener.accept()
    except BlockingIOError:
        return False
    return True


def judge(runner: Runner, source: str) -> str:
    """Returns the outcome of a program for the problem add(a, b)."""
    return runner.judge(source, TESTS, names=["add"], preamble=None, cpu_s=CPU_S).kind


def main(level: str) -> None:
    """Runs them all."""
    folder = Path(tempfile.mkdtemp(prefix="attack-"))
    folder.chmod(0o777)
    canary = folder / "canary"
    canary.write_text("alive")
    canary.chmod(0o666)
    before = canary.stat()
    tcp = socket.create_server(("127.0.0.1", 0))
    path_socket, abstract = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    path_socket.bind(str(folder / "socket"))
    (folder / "socket").chmod(0o777)
    abstract.bind("\0" + folder.name)
    for listener in (path_socket, abstract):
        listener.listen()
    places = {
        "CANARY": str(canary),
        "FOLDER": str(folder),
        "PORT": tcp.getsockname()[1],
        "SOCKET": str(folder / "socket"),
        "ABSTRACT": folder.name,
        "CALLER": os.getpid(),
    }
    runner = Runner(level, memory_bytes=1 << 28)
    runner.warm_up()
    breaches = []
    sources = {**CHEATS, **{name: program(body, places) for name, body in ATTACKS.items()}}
    for name, source in sources.items():
        outcome = judge(runner, source)
        if outcome in ("passed", "broken") and name not in BY_DESIGN[level]:
            breaches.append(f"{name}: {outcome}")
        if judge(runner, HONEST) != "passed":
            breaches.append(f"{name}: the next honest program does not pass")
    # A judge and two servers, each with the process that waits for it outside, and no more.
    if len(found := descendants()) > 5:
        breaches.append(f"{len(found)} processes are left")
    runner.close()
    after = canary.stat()
    checks = {
        "the canary was changed": canary.read_text() != "alive"
        or (before.st_mode, before.st_uid, before.st_mtime_ns)
        != (after.st_mode, after.st_uid, after.st_mtime_ns),
        "files were left": sorted(os.listdir(folder)) != ["canary", "socket"],
        "a socket was reached": any(map(has_visitor, (tcp, path_socket, abstract))),
        "processes outlive the sandbox": bool(descendants()),
    }
    breaches += [name for name, is_so in checks.items() if is_so]
    shutil.rmtree(folder)
    print(json.dumps({"num_programs": len(sources), "breaches": breaches, "user": os.getuid()}))


if __name__ == "__main__":
    main(sys.argv[1])
