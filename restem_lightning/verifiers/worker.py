"""A verifier worker process: `python -m restem_lightning.verifiers.worker FD`, started by the pool.

It speaks length-prefixed JSON over the socket FD. It receives its settings once, answers "ready",
then receives lists of jobs [problem, completion_text] and answers each job by its own message, in
order.
"""

import contextlib
import fcntl
import json
import math
import os
import resource
import signal
import socket
import sys
import time
from typing import Any

from restem_lightning.completions import Verdict, VerdictKind
from restem_lightning.problems import Problem
from restem_lightning.verifiers.base import HEADER, Verifier, VerifierSpec, frame

MAX_DETAIL = 500
CATCHABLE = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main() -> None:
    """Builds the verifier and serves jobs until the parent closes the socket."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    os.set_inheritable(channel.fileno(), False)
    stream = channel.makefile("rb")
    _end_with_parent()
    settings = _receive(stream)
    _limit(resource.RLIMIT_AS, settings["memory_bytes"])
    _limit(resource.RLIMIT_CORE, 0)
    try:
        verifier = VerifierSpec(**settings["spec"]).build()
        if hasattr(verifier, "warm_up"):
            verifier.warm_up()
    except (Exception, SystemExit) as error:
        channel.sendall(frame(["failed", _describe(error)]))
        return
    channel.sendall(frame(["ready", ""]))
    while (jobs := _receive(stream)) is not None:
        for problem, text in jobs:
            if settings["cpu_s"] is not None:
                limit = math.ceil(time.process_time() + settings["cpu_s"])
                resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
            answer = _judge(verifier, Problem(**problem), text)
            channel.sendall(frame(answer))
            if answer[-1]:
                return


def _judge(verifier: Verifier, problem: Problem, text: str) -> list[Any]:
    """Returns [kind, reward, extracted, detail, elapsed_s, is_last]; is_last: out of memory."""
    start = time.perf_counter()
    out_of_memory = False
    try:
        verdict = verifier.verify(problem, text)
        if not isinstance(verdict, Verdict):
            raise TypeError(f"verify must return a Verdict, not {type(verdict)}")
        if not isinstance(verdict.extracted, str | None):
            raise TypeError(f"extracted must be a string or None, not {type(verdict.extracted)}")
    except BaseException as error:  # the verifier boundary: whatever it raises is its verdict
        out_of_memory = isinstance(error, MemoryError)
        verdict = Verdict(kind=VerdictKind.ERROR, detail=_describe(error))
    elapsed_s = time.perf_counter() - start
    detail, reward = str(verdict.detail)[:MAX_DETAIL], float(verdict.reward)
    return [verdict.kind.value, reward, verdict.extracted, detail, elapsed_s, out_of_memory]


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")[:MAX_DETAIL]


def _receive(stream: Any) -> Any:
    """Returns the next message, None once the parent has gone."""
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    (size,) = HEADER.unpack(header)
    payload = stream.read(size)
    return json.loads(payload) if len(payload) == size else None


def _limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def _end_with_parent() -> None:
    """Makes the kernel end this process when the parent's end of stdin closes, even in a hang.

    SIGIO's default action ends a process without the interpreter's help, which a long call into C
    would never give. Other signals are for the parent to decide on: a handler that does nothing
    (unlike SIG_IGN, it is not passed on to programs that a verifier starts).
    """
    for number in CATCHABLE:
        signal.signal(number, lambda *_: None)
    lifeline = os.dup(0)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    flags = fcntl.fcntl(lifeline, fcntl.F_GETFL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, flags | os.O_ASYNC)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        main()
