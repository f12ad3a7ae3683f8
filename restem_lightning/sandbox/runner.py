"""Programs against tests: a sandbox for the candidate, another one for the judge.

They share nothing but one socket, over which the judge asks and the candidate answers.
"""

import contextlib
import math
import os
import secrets
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from restem_lightning.sandbox.client import Ended, Limits, Sandbox, SandboxError
from restem_lightning.sandbox.inside.codec import Channel, ChannelError, frame

MAX_PROGRAM_BYTES = 100_000
MAX_LOAD_S = 10.0  # CPU seconds of a judge to read its tests
_GRACE_S = 1.0
_WALL_PER_CPU = 3.0  # time-outs should count work, not waiting for a busy machine


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one program.

    Args:
        kind: passed, failed (a test, or the program raised), lost (the program ended or broke the
            protocol), timeout, or broken (the tests themselves).
        detail: what decided it, in words.
        cpu_s: CPU seconds of the program.
        output: what a script wrote to standard output.
    """

    kind: str
    detail: str = ""
    cpu_s: float = 0.0
    output: bytes = b""


class Runner:
    """Runs programs at one level of isolation; starts again what has ended."""

    def __init__(self, level: str, *, memory_bytes: int) -> None:
        """Starts nothing yet.

        Args:
            level: namespaces, landlock or seccomp.
            memory_bytes: address space of a program.
        """
        self.level, self._memory_bytes = level, memory_bytes
        self._sandboxes: dict[str, Sandbox] = {}
        self._judged: tuple[tuple[Any, ...], socket.socket] | None = None

    def judge(
        self, program: str, tests: str, *, names: list[str], preamble: str | None, cpu_s: float
    ) -> Outcome:
        """Returns whether a program passes tests, each of which must run in the judge.

        Args:
            program: source of the candidate.
            tests: source of the asserts.
            names: functions under test; other names that the tests lack are asked for when used.
            preamble: source whose names the tests may use (imports, helpers), or None.
            cpu_s: CPU seconds of the program.

        Raises:
            SandboxError: a sandbox cannot be started, or does not answer.
        """
        load = _first_message(program)
        if load is None:
            return Outcome(kind="failed", detail=f"more than {MAX_PROGRAM_BYTES} bytes")
        candidates = self._sandbox("candidate")
        nonce = secrets.token_hex(16)
        asking, answering = socket.socketpair()
        with self._freed_on_error():
            report = self._judge_of((tests, tuple(names), preamble))
            with asking, answering:
                asking.sendall(load)
                candidates.start("candidate", [answering.fileno()], self._limits(cpu_s))
                socket.send_fds(report, [b"+"], [asking.fileno()])
            deadline = time.monotonic() + _wall_s(cpu_s)
            answer, problem = None, ""
            try:
                report.settimeout(_wall_s(cpu_s))
                channel = Channel(report)
                channel.send([nonce, cpu_s])
                answer = channel.receive()
            except ChannelError as error:
                problem = str(error)
            is_late = answer is None and time.monotonic() >= deadline
            ended = candidates.end()
            judge_ended = self._end_judge() if answer is None else None
        if is_late or ended.is_out_of_cpu or (judge_ended and judge_ended.is_out_of_cpu):
            return Outcome(kind="timeout", detail=_used(ended, is_late), cpu_s=ended.cpu_s)
        kind, detail = _verdict(answer, nonce, problem)
        if kind == "lost":
            detail = _how_it_ended(ended, detail)
        return Outcome(kind=kind, detail=detail, cpu_s=ended.cpu_s)

    def run_script(self, program: str, stdin: bytes, *, cpu_s: float) -> Outcome:
        """Returns what a program writes when it is run with some standard input.

        The outcome is `passed` if it came to its end, by itself and without an exception.

        Raises:
            SandboxError: a sandbox cannot be started, or does not answer.
        """
        load = _first_message(program)
        if load is None:
            return Outcome(kind="failed", detail=f"more than {MAX_PROGRAM_BYTES} bytes")
        limits = self._limits(cpu_s)
        candidates = self._sandbox("candidate")
        report, theirs = socket.socketpair()
        with report, _memory_file(stdin) as source, _memory_file(b"") as target:
            with theirs, self._freed_on_error():
                candidates.start("script", [theirs.fileno(), source, target], limits)
            with self._freed_on_error():
                report.sendall(load)
                own_end = candidates.wait(_wall_s(cpu_s))
                ended = own_end or candidates.end()
            output = os.pread(target, limits.file_bytes, 0)
            if own_end is None or ended.is_out_of_cpu:
                detail = _used(ended, own_end is None)
                return Outcome(kind="timeout", detail=detail, cpu_s=ended.cpu_s)
            report.settimeout(_GRACE_S)
            try:
                kind, name, message = Channel(report).receive()
            except (ChannelError, ValueError, TypeError):
                detail = _how_it_ended(ended, "the program ended by itself")
                kind = "passed" if ended.status == 0 else "lost"
                return Outcome(kind=kind, detail=detail, cpu_s=ended.cpu_s, output=output)
        is_whole = kind == "ended" and ended.status == 0
        return Outcome(
            kind="passed" if is_whole else "failed",
            detail="" if is_whole else f"{name}: {message}".removesuffix(": "),
            cpu_s=ended.cpu_s,
            output=output,
        )

    @property
    def has_own_user(self) -> bool:
        """Whether programs run as a user that is not the caller."""
        return self._sandbox("candidate").has_own_user

    def close(self) -> None:
        """Ends the sandboxes."""
        self._judged = None
        while self._sandboxes:
            self._sandboxes.popitem()[1].close()

    def warm_up(self) -> None:
        """Starts both sandboxes."""
        self._sandbox("candidate")
        self._sandbox("judge")

    def _judge_of(self, key: tuple[Any, ...]) -> socket.socket:
        """Returns the socket of a judge that holds the tests; the one before is ended."""
        if self._judged is not None:
            if self._judged[0] == key:
                return self._judged[1]
            self._end_judge()
        report, theirs = socket.socketpair()
        with theirs:
            self._sandbox("judge").start("judge", [theirs.fileno()], self._limits(MAX_LOAD_S))
        self._judged = key, report
        report.settimeout(_wall_s(MAX_LOAD_S))
        with contextlib.suppress(ChannelError):  # then the judge gives no answer either
            Channel(report).send(list(key))
        return report

    def _end_judge(self) -> Ended:
        assert self._judged is not None
        self._judged[1].close()
        self._judged = None
        return self._sandbox("judge").end()

    def _limits(self, cpu_s: float) -> Limits:
        return Limits(cpu_s=math.ceil(cpu_s), memory_bytes=self._memory_bytes)

    def _sandbox(self, name: str) -> Sandbox:
        if name not in self._sandboxes:
            self._sandboxes[name] = Sandbox(self.level)
        return self._sandboxes[name]

    @contextlib.contextmanager
    def _freed_on_error(self) -> Iterator[None]:
        """Ends the sandboxes after an error, so that the next program finds fresh ones."""
        try:
            yield
        except (OSError, SandboxError) as error:
            self.close()
            raise SandboxError(str(error)) from error


def _first_message(program: str) -> bytes | None:
    """Returns the message that hands a program over, None if it is too large."""
    message = frame([program])
    return message if len(message) <= MAX_PROGRAM_BYTES else None


def _wall_s(cpu_s: float) -> float:
    return _WALL_PER_CPU * cpu_s + _GRACE_S


def _used(ended: Ended, is_late: bool) -> str:
    return f"{'wall-clock' if is_late else 'CPU'} limit, after {ended.cpu_s:.1f} CPU seconds"


def _verdict(answer: Any, nonce: str, problem: str) -> tuple[str, str]:
    """Returns kind and detail of what the judge answered; a pass needs the nonce and the counts."""
    if answer is None:
        return "broken", f"the judge gave no answer: {problem}"
    try:
        echo, kind, detail, num_ran, num_expected = answer
        is_whole = echo == nonce and 0 < num_expected <= num_ran
    except (TypeError, ValueError):
        return "broken", "the judge gave no answer that can be read"
    if kind == "passed" and not is_whole:
        return "failed", "not all asserts ran"
    return str(kind), str(detail)


def _how_it_ended(ended: Ended, detail: str) -> str:
    """Returns why a candidate is gone: its exit status or signal says more than its silence."""
    if ended.status < 0 and ended.status != -signal.SIGKILL:
        return f"the program was ended by {signal.Signals(-ended.status).name}"
    return f"the program ended with status {ended.status}" if ended.status >= 0 else detail


@contextlib.contextmanager
def _memory_file(content: bytes) -> Iterator[int]:
    """Opens a file in memory with some content, to be read from its start."""
    descriptor = os.memfd_create("standard", os.MFD_CLOEXEC)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)
