"""Which isolation this machine gives: each level is tried, and attacked from inside, for real."""

import contextlib
import json
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from restem_lightning.errors import UserError
from restem_lightning.sandbox.client import LEVELS, Limits, SandboxError
from restem_lightning.sandbox.runner import Runner

_MEMORY_BYTES = 1 << 28
_ATTEMPTS = Path(__file__).with_name("attempts.py")
_CANARY = "canary"
# Where there is no file system of its own, the caller's files can be read by design of the level.
_NOT_CONTAINED = {"seccomp": ("read_file", "see_caller")}
_MEANS = {
    "namespaces": "own user, mount, process, network and IPC namespaces, seccomp, limits",
    "landlock": "Landlock, seccomp, limits; no private directory, so programs cannot write files",
    "seccomp": "seccomp and limits only: programs can read the files of this user",
}


@dataclass(frozen=True, kw_only=True)
class SandboxReport:
    """The strongest isolation found on this machine, and why not more.

    Args:
        level: namespaces, landlock, seccomp, or None if foreign code cannot be confined at all.
        has_own_user: whether programs run as a user id of their own.
        detail: what the level consists of.
        refusals: why each stronger level is not there.
    """

    level: str | None
    has_own_user: bool = False
    detail: str = ""
    refusals: tuple[str, ...] = ()

    @property
    def remedy(self) -> str:
        """What a user can do for a stronger level."""
        if self.level == LEVELS[0]:
            return ""
        return (
            "allow unprivileged user namespaces (sysctl user.max_user_namespaces above 0; on "
            "Ubuntu kernel.apparmor_restrict_unprivileged_userns=0; in Docker a seccomp profile "
            "that allows unshare and mount), or use a kernel with Landlock (5.13 or later)"
        )


def probe() -> SandboxReport:
    """Returns the strongest level whose walls hold; takes a fraction of a second."""
    refusals: list[str] = []
    for level in LEVELS:
        runner = Runner(level, memory_bytes=_MEMORY_BYTES)
        try:
            broken = attack(runner)
            has_own_user = runner.has_own_user
        except (SandboxError, OSError) as error:
            refusals.append(str(error))
            continue
        finally:
            runner.close()
        if broken:
            refusals.append(f"level {level}: a program could {', '.join(broken)}")
            continue
        return SandboxReport(
            level=level,
            has_own_user=has_own_user,
            detail=_MEANS[level],
            refusals=tuple(refusals),
        )
    return SandboxReport(level=None, refusals=tuple(refusals))


def require(minimum: str, report: SandboxReport | None = None) -> SandboxReport:
    """Returns what `probe` finds, if it is enough.

    Args:
        minimum: the weakest level that will do: namespaces, landlock or seccomp.
        report: what it has found already, None to probe now.

    Raises:
        UserError: an unknown level, or this machine gives less.
    """
    if minimum not in LEVELS:
        raise UserError(f"min_isolation ({minimum}) must be one of {', '.join(LEVELS)}")
    report = report or probe()
    if report.level is None or LEVELS.index(report.level) > LEVELS.index(minimum):
        raise UserError(
            f"foreign code is refused: this machine gives isolation level "
            f"{report.level or 'none'}, min_isolation is {minimum} "
            f"({'; '.join(report.refusals)}). Remedy: {report.remedy}"
            + (f"; or accept min_isolation: {report.level}" if report.level else "")
        )
    return report


def attack(runner: Runner) -> list[str]:
    """Returns the names of the attempts (attempts.py) that succeed in a runner's sandbox.

    Raises:
        SandboxError: the sandbox cannot be started, or the attempts gave no answer.
    """
    with _places() as (places, check):
        text = json.dumps(places) + "\n"
        outcome = runner.run_script(_ATTEMPTS.read_text(), text.encode(), cpu_s=5)
        try:
            results = json.loads(outcome.output)
        except ValueError:
            raise SandboxError(f"level {runner.level}: no answer ({outcome.detail})") from None
        results |= check()
    allowed = _NOT_CONTAINED.get(runner.level, ())
    return sorted(name for name, done in results.items() if done and name not in allowed)


@contextlib.contextmanager
def _places() -> Iterator[tuple[dict[str, Any], Any]]:
    """Sets up a file, a port and a socket file of the caller, and a check that nobody used them."""
    folder = Path(tempfile.mkdtemp(prefix="restem-probe-"))
    folder.chmod(0o777)
    file = folder / "canary"
    file.write_text(_CANARY)
    file.chmod(0o666)
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(folder / "socket"))
        unix.listen()
        (folder / "socket").chmod(0o777)
        for listener in (tcp, unix):
            listener.setblocking(False)

        def check() -> dict[str, bool]:
            return {
                "reach a socket": any(map(_has_visitor, (tcp, unix))),
                "change a file": file.read_text() != _CANARY or len(os.listdir(folder)) != 2,
            }

        try:
            yield (
                {
                    "file": str(file),
                    "port": tcp.getsockname()[1],
                    "socket": str(folder / "socket"),
                    "pid": os.getpid(),
                    "python": sys.executable,
                    "memory_bytes": 2 * _MEMORY_BYTES,
                    "private_bytes": Limits(cpu_s=1, memory_bytes=1).private_bytes,
                },
                check,
            )
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _has_visitor(listener: socket.socket) -> bool:
    try:
        listener.accept()
    except BlockingIOError:
        return False
    return True
