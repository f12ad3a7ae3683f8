"""The fork server: an interpreter with its imports done, from which each program is forked.

It is the first process of its sandbox and does what its parent says over a socket, one program at a
time. It never reads a program: the forked child does, from a socket of its own.
"""

import contextlib
import errno
import fcntl
import gc
import json
import os
import resource
import select
import signal
import socket
import sys
from typing import Any

from . import candidate, judge, landlock, namespaces, seccomp
from .codec import ChannelError
from .kernel import PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, PR_SET_PDEATHSIG, drop_capabilities, prctl

NAMESPACES, LANDLOCK, SECCOMP = "namespaces", "landlock", "seccomp"
_MAX_HEADER = 4096
_FIRST_FD = 3
_WARM = (
    "__future__ abc array base64 bisect calendar cmath collections.abc contextlib copy dataclasses "
    "datetime decimal enum fractions functools hashlib heapq io itertools math numbers operator "
    "queue random re statistics string struct textwrap threading time typing unicodedata zlib"
)
_ROLES = {
    "candidate": candidate.serve_calls,
    "script": candidate.run_script,
    "judge": judge.run_tests,
}


def main() -> None:
    """Isolates this process and serves; the arguments are the socket and the level."""
    descriptor, level = int(sys.argv[1]), sys.argv[2]
    control = socket.socket(fileno=descriptor)
    os.set_inheritable(descriptor, False)
    for name in _WARM.split():
        __import__(name)
    ours = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    sys.path[:] = [path for path in sys.path if path not in ("", ours)]
    os.environ.clear()
    try:
        _, user = json.loads(control.recv(_MAX_HEADER))
        server = _Server(control, level, user)
    except (OSError, KeyError, ValueError) as error:
        _send(control, "failed", str(error))
        return
    _send(control, "ready")
    server.serve()


class _Server:
    """One sandbox: its level, and the program that runs in it, if any."""

    def __init__(self, control: socket.socket, level: str, user: int) -> None:
        self._control, self._level = control, level
        self._child: int | None = None
        with contextlib.suppress(OSError):
            fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY)
            os.write(fd, b"1000")
            os.close(fd)
        with contextlib.suppress(PermissionError):
            os.setgroups([])
        _, allowed = resource.getrlimit(resource.RLIMIT_CPU)  # the soft limit is a job's, not ours
        resource.setrlimit(resource.RLIMIT_CPU, (allowed, allowed))
        self._ruleset = None
        if level == NAMESPACES:
            namespaces.enter(self._ask_for_ids)
        else:
            if level == LANDLOCK:
                self._ruleset = landlock.make_ruleset(namespaces.readable_paths())
            if os.geteuid() == 0:
                os.setresgid(user, user, user)
                os.setresuid(user, user, user)
            os.chdir("/")
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        prctl(PR_SET_DUMPABLE, 0)  # closes this process's files in /proc to its own user
        self._filter = seccomp.build_filter(is_writable=level == NAMESPACES)
        self._wake, writer = os.pipe()
        for end in (self._wake, writer):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(writer)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        gc.collect()
        gc.freeze()

    def serve(self) -> None:
        """Runs programs until the parent closes the socket; then everything here ends."""
        while True:
            ready, _, _ = select.select([self._control, self._wake], [], [])
            if self._wake in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake, 4096)
                self._reap(is_killed=False)
            if self._control in ready:
                data, fds, _, _ = socket.recv_fds(self._control, _MAX_HEADER, 4)
                if not data:
                    self._reap(is_killed=True)
                    return
                message = json.loads(data)
                if message[0] == "end":
                    self._reap(is_killed=True)
                else:
                    self._start(message[1], message[2], fds)

    def _ask_for_ids(self) -> None:
        _send(self._control, "unshared")
        if not self._control.recv(_MAX_HEADER):
            raise OSError(errno.EPERM, "the parent could not map the user")

    def _start(self, role: str, limits: dict[str, Any], fds: list[int]) -> None:
        if self._level == NAMESPACES:
            namespaces.fresh_private(limits["private_bytes"])
        self._child = os.fork()
        if self._child == 0:
            status = 1
            try:
                self._become(role, limits, fds)
                status = 0
            except (Exception, ChannelError, KeyboardInterrupt):
                pass
            finally:
                os._exit(status)
        for fd in fds:
            os.close(fd)

    def _reap(self, *, is_killed: bool) -> None:
        """Buries the program if it has ended or is to be killed, with all that it left running."""
        if self._child is None:
            return
        if is_killed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._child, signal.SIGKILL)
        pid, status, usage = os.wait4(self._child, 0 if is_killed else os.WNOHANG)
        if pid == 0:
            return
        self._child = None
        if self._level == NAMESPACES:
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                while True:
                    os.waitpid(-1, 0)
        cpu_s = usage.ru_utime + usage.ru_stime
        _send(self._control, "ended", os.waitstatus_to_exitcode(status), cpu_s)

    def _become(self, role: str, limits: dict[str, Any], fds: list[int]) -> None:
        """Turns the forked child into a program: confined first, then run."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.setsid()
        kept = [fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in fds]
        if self._ruleset is not None:
            landlock.restrict_self(self._ruleset)
        if role == "script":
            os.dup2(kept[1], 0)
            os.dup2(kept[2], 1)
        os.dup2(kept[0], _FIRST_FD)
        os.closerange(_FIRST_FD + 1, 4096)
        if self._level == NAMESPACES:
            os.chdir(namespaces.PRIVATE)
        stream = socket.socket(fileno=_FIRST_FD)
        _limit_self(limits, is_judge=role == "judge")
        drop_capabilities()
        seccomp.install_filter(self._filter)
        _ROLES[role](stream)


def _limit_self(limits: dict[str, Any], *, is_judge: bool) -> None:
    """Sets the limits of this process; a judge lives on and sets its CPU limit for each program."""
    pairs = {
        resource.RLIMIT_AS: (limits["memory_bytes"], limits["memory_bytes"]),
        resource.RLIMIT_CPU: (
            limits["cpu_s"],
            resource.RLIM_INFINITY if is_judge else limits["cpu_s"] + 1,
        ),
        resource.RLIMIT_FSIZE: (limits["file_bytes"], limits["file_bytes"]),
        resource.RLIMIT_NOFILE: (limits["num_files"], limits["num_files"]),
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_MEMLOCK: (0, 0),
        resource.RLIMIT_STACK: (limits["stack_bytes"], limits["stack_bytes"]),
    }
    if limits["num_threads"]:
        pairs[resource.RLIMIT_NPROC] = (limits["num_threads"], limits["num_threads"])
    for kind, values in pairs.items():
        _, allowed = resource.getrlimit(kind)
        resource.setrlimit(kind, tuple(_at_most(value, allowed) for value in values))


def _at_most(value: int, allowed: int) -> int:
    """Returns the smaller of two limits, either of which may be RLIM_INFINITY (which is -1)."""
    finite = [limit for limit in (value, allowed) if limit != resource.RLIM_INFINITY]
    return min(finite, default=resource.RLIM_INFINITY)


def _send(control: socket.socket, *message: Any) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        control.send(json.dumps(message).encode())
