"""One sandbox from outside: started, told what to run, and ended."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from restem_lightning.sandbox.inside.server import LANDLOCK, NAMESPACES, SECCOMP

LEVELS = (NAMESPACES, LANDLOCK, SECCOMP)  # strongest first
START_LIMIT_S = 60.0
END_LIMIT_S = 30.0
_FIRST_SLOT = 1_000_000_000
_FOLDER = str(Path(__file__).parent)
_PROGRAM = "import sys; sys.path.insert(0, sys.argv.pop(1)); import inside.server as s; s.main()"


class SandboxError(Exception):
    """A sandbox cannot be started, or has ended by itself."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one program may use; it is one process, so these bound all of it.

    Args:
        cpu_s: CPU seconds, whole.
        memory_bytes: address space, the interpreter's own included.
        file_bytes: size of any one file, standard output included.
        private_bytes: all files in the private directory together (level namespaces).
        stack_bytes: the stack of the main thread.
        num_threads: threads; 0 for no limit (where the count would be the whole user's).
        num_files: open files.
    """

    cpu_s: int
    memory_bytes: int
    file_bytes: int = 1 << 24
    private_bytes: int = 1 << 24
    stack_bytes: int = 1 << 26
    num_threads: int = 64
    num_files: int = 64


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a program ended: exit status (negative: a signal) and CPU seconds used."""

    status: int
    cpu_s: float

    @property
    def is_out_of_cpu(self) -> bool:
        """Whether the limit of CPU seconds ended it."""
        return self.status == -signal.SIGXCPU


class Sandbox:
    """A warm interpreter behind walls, which runs one program at a time in a fresh process."""

    def __init__(self, level: str) -> None:
        """Starts the interpreter and waits until it is behind its walls.

        Args:
            level: namespaces, landlock or seccomp.

        Raises:
            SandboxError: this machine does not allow that level.
        """
        self.level = level
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        kept = {k: v for k, v in os.environ.items() if k == "LD_LIBRARY_PATH"}
        words = ["-S", "-s", "-B", "-c", _PROGRAM, _FOLDER, str(theirs.fileno()), level]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env=kept | {"PYTHONHASHSEED": "0"},  # verdicts must not follow the hash seed
                cwd="/",
            )
        self.user = _slot_user(self._process.pid)
        try:
            self._control.settimeout(START_LIMIT_S)
            self._control.send(json.dumps(["user", self.user]).encode())
            message = self._receive()
            if message[0] == "unshared":
                self._map_user()
                self._control.send(b'["mapped"]')
                message = self._receive()
            if message[0] != "ready":
                raise SandboxError(str(message[1]))
        except (OSError, SandboxError) as error:
            self.close()
            raise SandboxError(f"level {level}: {error}") from None

    @property
    def has_own_user(self) -> bool:
        """Whether programs run as a user that is not the caller."""
        return self.user != os.getuid()

    def start(self, role: str, sockets: Sequence[int], limits: Limits) -> None:
        """Starts a program; `end` must follow.

        Args:
            role: candidate, script or judge.
            sockets: descriptors that go to the program; the caller keeps its own copies.
            limits: what it may use.

        Raises:
            SandboxError: the sandbox is gone.
        """
        values = asdict(limits)
        if self.level != NAMESPACES and not self.has_own_user:
            values["num_threads"] = 0
        message = json.dumps(["run", role, values]).encode()
        try:
            socket.send_fds(self._control, [message], list(sockets))
        except OSError as error:
            raise SandboxError(f"the sandbox is gone ({error})") from None

    def wait(self, timeout_s: float) -> Ended | None:
        """Returns how the program ended by itself, None if it still runs after `timeout_s`."""
        self._control.settimeout(timeout_s)
        try:
            return self._ended()
        except TimeoutError:
            return None

    def end(self) -> Ended:
        """Ends the program and all that it left; returns how it ended.

        Raises:
            SandboxError: the sandbox is gone.
        """
        with contextlib.suppress(OSError):
            self._control.send(b'["end"]')
        self._control.settimeout(END_LIMIT_S)
        try:
            return self._ended()
        except TimeoutError:
            raise SandboxError("the sandbox does not answer") from None

    def close(self) -> None:
        """Ends the sandbox and everything in it. May be called twice."""
        self._control.close()
        try:
            self._process.wait(END_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ended(self) -> Ended:
        _, status, cpu_s = self._receive()
        return Ended(status=status, cpu_s=cpu_s)

    def _receive(self) -> list:
        data = self._control.recv(4096)
        if not data:
            raise SandboxError("the sandbox is gone")
        return json.loads(data)

    def _map_user(self) -> None:
        """Gives the new user namespace its one user and group, from outside."""
        folder = Path(f"/proc/{self._process.pid}")
        if os.geteuid() != 0:
            (folder / "setgroups").write_text("deny")
        (folder / "uid_map").write_text(f"1 {self.user} 1")
        group = self.user if self.has_own_user else os.getgid()
        (folder / "gid_map").write_text(f"1 {group} 1")


def _slot_user(pid: int) -> int:
    """Returns the user id of a sandbox: as root one of its own, else the caller's.

    Counts and signals go by user, so no two sandboxes that live at once share one; `pid` is what
    tells them apart.
    """
    if os.geteuid() != 0:
        return os.getuid()
    extents = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
    end = max(int(start) + int(count) for start, _, count in extents)
    if end > _FIRST_SLOT * 2:
        return _FIRST_SLOT + pid
    return 30_000 + pid % 30_000 if end > 60_000 else os.getuid()  # a container with few ids
