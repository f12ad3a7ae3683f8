"""A pool of verifier processes: bounded, killable, never in the way of the sampler."""

import collections
import contextlib
import json
import math
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from restem_lightning.completions import Verdict, VerdictKind
from restem_lightning.errors import UserError
from restem_lightning.problems import Problem
from restem_lightning.verifiers.base import HEADER, VerifierSpec, frame

START_LIMIT_S = 120.0
MAX_FAILED_STARTS = 3
MAX_WINDOW = 64
WINDOW_S = 0.02
CACHE_SIZE = 100_000
RECEIVE_BYTES = 1 << 18


@dataclass(frozen=True, kw_only=True)
class _Job:
    key: Hashable
    problem: Problem
    text: str
    cache_key: tuple[Any, ...] | None


class _Worker:
    """One process, its socket, and the jobs that it has been sent, oldest first."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.socket, theirs = socket.socketpair()
        environment = dict(os.environ, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
        environment["PYTHONHASHSEED"] = "0"  # sympy's order of work follows the hash seed
        environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "restem_lightning.verifiers.worker", str(theirs.fileno())],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env=environment,
                start_new_session=True,
            )
        self.socket.setblocking(False)
        self.outgoing = bytearray(frame(settings))
        self.incoming = bytearray()
        self.jobs: collections.deque[_Job] = collections.deque()
        self.is_ready = False
        self.is_leaving = False
        self.head_start = time.monotonic()
        self.is_watched_for_writing = False

    def end(self) -> int:
        """Kills the process and whatever it started; returns its exit status."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        status = self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.socket.close()
        return status

    def messages(self) -> Iterator[Any]:
        """Yields the whole messages received so far."""
        while len(self.incoming) >= HEADER.size:
            (size,) = HEADER.unpack_from(self.incoming)
            end = HEADER.size + size
            if len(self.incoming) < end:
                return
            message = json.loads(self.incoming[HEADER.size : end])
            del self.incoming[:end]
            yield message


class VerifierPool:
    """Verifies completions in worker processes that have a memory limit and a deadline per job.

    Nothing here waits for a verdict except `poll` (as long as it is told), `drain` and
    `verify_all`. There is no thread: `poll` is what collects verdicts, enforces deadlines and feeds
    idle workers, so call it often. A worker that hangs is killed, one that dies is replaced, and
    only the job it was working on is affected. If the verifier has a `cache_key`, equal keys are
    verified once, and where its `quick_verdict` has an answer, no worker is asked. Not to be shared
    between threads.
    """

    def __init__(
        self,
        spec: VerifierSpec,
        *,
        num_workers: int = 1,
        deadline_s: float = 5.0,
        memory_bytes: int = 1 << 30,
        cpu_s: float | None = None,
    ) -> None:
        """Starts the workers; they import while the caller goes on.

        Args:
            spec: how to build the verifier; it is also built here once, to find mistakes early.
            num_workers: processes, at least 1.
            deadline_s: wall-clock seconds for one job; a job that takes longer is TIMEOUT. A
                verifier that bounds its jobs itself says in its `deadline_s` how long they may
                take; then that counts, if it is more.
            memory_bytes: address space of one worker; a job that needs more is ERROR.
            cpu_s: CPU seconds for one job (rounded up), None for no such limit; then TIMEOUT.

        Raises:
            UserError: a bad class path or bad arguments of the verifier, or a limit out of range.
        """
        for name, value in (("num_workers", num_workers), ("deadline_s", deadline_s)):
            if value <= 0:
                raise UserError(f"{name} ({value}) must be greater than 0")
        self.verifier = spec.build()
        self._settings = {"spec": asdict(spec), "memory_bytes": memory_bytes, "cpu_s": cpu_s}
        self._deadline_s = max(deadline_s, getattr(self.verifier, "deadline_s", 0.0))
        self._queue: collections.deque[_Job] = collections.deque()
        self._done: collections.deque[tuple[Hashable, Verdict]] = collections.deque()
        self._num_pending = 0
        self._cache: dict[tuple[Any, ...], Verdict] = {}
        self._waiting: dict[tuple[Any, ...], list[Hashable]] = {}
        self._mean_s = WINDOW_S
        self._num_failed_starts = 0
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        for _ in range(num_workers):
            self._start_worker()

    @property
    def record(self) -> dict[str, Any]:
        """All that the verdicts depend on, JSON-serialisable."""
        return {**self._settings, "deadline_s": self._deadline_s}

    @property
    def num_pending(self) -> int:
        """How many submitted jobs have not been handed back yet."""
        return self._num_pending

    def submit(self, key: Hashable, problem: Problem, completion_text: str) -> None:
        """Queues one job; `key` comes back with its verdict. Never waits."""
        self._num_pending += 1
        cache_key = self._cache_key(problem, completion_text)
        if cache_key is not None:
            if (known := self._cache.get(cache_key)) is not None:
                self._done.append((key, known))
                return
            if (waiting := self._waiting.get(cache_key)) is not None:
                waiting.append(key)
                return
            if (verdict := self._quick_verdict(cache_key)) is not None:
                self._done.append((key, verdict))
                return
            self._waiting[cache_key] = []
        self._queue.append(
            _Job(key=key, problem=problem, text=completion_text, cache_key=cache_key)
        )
        self._feed()

    def poll(self, timeout_s: float = 0.0) -> list[tuple[Hashable, Verdict]]:
        """Returns the verdicts that are there, waiting up to `timeout_s` seconds for the first."""
        end = time.monotonic() + timeout_s
        while True:
            remaining_s = end - time.monotonic()
            is_enough = bool(self._done) or remaining_s <= 0 or self._num_pending == 0
            self._step(0.0 if is_enough else remaining_s)
            if is_enough:
                break
        results = list(self._done)
        self._done.clear()
        self._num_pending -= len(results)
        return results

    def drain(self) -> Iterator[tuple[Hashable, Verdict]]:
        """Yields verdicts until none is pending."""
        while self._num_pending:
            yield from self.poll(1.0)

    def verify_all(self, pairs: Iterable[tuple[Problem, str]]) -> list[Verdict]:
        """Returns the verdicts of (problem, completion_text) pairs, in their order."""
        assert self._num_pending == 0, "verify_all needs a drained pool"
        for index, (problem, text) in enumerate(pairs):
            self.submit(index, problem, text)
        verdicts = dict(self.drain())
        return [verdicts[index] for index in range(len(verdicts))]

    def close(self) -> None:
        """Kills the workers; pending jobs are lost. May be called twice."""
        while self._workers:
            self._workers.pop().end()
        self._selector.close()

    def __enter__(self) -> "VerifierPool":
        """Returns the pool itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the pool."""
        self.close()

    def _cache_key(self, problem: Problem, text: str) -> tuple[Any, ...] | None:
        if not hasattr(self.verifier, "cache_key"):
            return None
        try:
            return self.verifier.cache_key(problem, text)
        except Exception:  # the verifier boundary: verify will raise the same in a worker
            return None

    def _quick_verdict(self, cache_key: tuple[Any, ...]) -> Verdict | None:
        if not hasattr(self.verifier, "quick_verdict"):
            return None
        try:
            return self.verifier.quick_verdict(cache_key)
        except Exception:  # the verifier boundary: verify will raise the same in a worker
            return None

    def _start_worker(self) -> None:
        worker = _Worker(self._settings)
        self._workers.append(worker)
        self._selector.register(worker.socket, selectors.EVENT_READ, worker)
        self._send(worker)

    def _step(self, wait_s: float) -> None:
        """Moves bytes for up to `wait_s` seconds, replaces late workers and feeds idle ones."""
        now = time.monotonic()
        limits = [self._limit_of(worker) for worker in self._workers]
        wait_s = max(0.0, min([wait_s, *(limit - now for limit in limits)]))
        for event, mask in self._selector.select(wait_s):
            worker = event.data
            if mask & selectors.EVENT_WRITE:
                self._send(worker)
            if mask & selectors.EVENT_READ:
                self._receive(worker)
        for worker in list(self._workers):
            if time.monotonic() > self._limit_of(worker):
                self._receive(worker)
                if worker in self._workers and time.monotonic() > self._limit_of(worker):
                    self._replace(worker, late=True)
        self._feed()

    def _limit_of(self, worker: _Worker) -> float:
        if not worker.is_ready:
            return worker.head_start + START_LIMIT_S
        return worker.head_start + self._deadline_s if worker.jobs else math.inf

    def _feed(self) -> None:
        """Sends queued jobs to workers, few at a time while jobs are slow."""
        window = max(1, min(MAX_WINDOW, int(WINDOW_S / self._mean_s)))
        share = math.ceil(len(self._queue) / max(1, len(self._workers)))
        for worker in self._workers:
            if not self._queue:
                return
            if not worker.is_ready or len(worker.jobs) > window // 2:
                continue
            parts: list[str] = []
            while self._queue and len(worker.jobs) < window and len(parts) < share:
                job = self._queue.popleft()
                try:
                    parts.append(json.dumps([vars(job.problem), job.text]))
                except (TypeError, ValueError) as error:
                    self._finish(job, _error(f"the problem is not JSON-serialisable: {error}"))
                    continue
                if not worker.jobs:
                    worker.head_start = time.monotonic()
                worker.jobs.append(job)
            payload = f"[{','.join(parts)}]".encode()
            worker.outgoing += HEADER.pack(len(payload)) + payload
            self._send(worker)

    def _send(self, worker: _Worker) -> None:
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            while worker.outgoing:
                del worker.outgoing[: worker.socket.send(worker.outgoing)]
        if bool(worker.outgoing) != worker.is_watched_for_writing:
            worker.is_watched_for_writing = bool(worker.outgoing)
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.outgoing else 0)
            self._selector.modify(worker.socket, events, worker)

    def _receive(self, worker: _Worker) -> None:
        try:
            data = worker.socket.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except ConnectionResetError:
            data = b""
        worker.incoming += data
        for message in worker.messages():
            worker.head_start = time.monotonic()
            if not worker.is_ready:
                self._note_start(worker, *message)
            else:
                self._note_verdict(worker, message)
                if message[
                    -1
                ]:  # memory ran out: the worker leaves, its other jobs are not to blame
                    worker.is_leaving = True
                    data = b""
                    break
        if not data:
            self._replace(worker, late=False)

    def _note_start(self, worker: _Worker, outcome: str, detail: str) -> None:
        if outcome == "failed":
            raise UserError(
                f"a verifier worker could not start: {detail}; check the verifier's settings and "
                f"memory_bytes ({self._settings['memory_bytes']})"
            )
        worker.is_ready = True
        self._num_failed_starts = 0

    def _note_verdict(self, worker: _Worker, message: list[Any]) -> None:
        kind, reward, extracted, detail, elapsed_s, _ = message
        if elapsed_s > self._deadline_s:
            kind, reward, detail = VerdictKind.TIMEOUT, None, f"took {elapsed_s:.1f} s"
        self._mean_s = 0.9 * self._mean_s + 0.1 * elapsed_s
        self._finish(
            worker.jobs.popleft(),
            Verdict(
                kind=VerdictKind(kind),
                reward=reward,
                extracted=extracted,
                detail=detail,
                elapsed_s=elapsed_s,
            ),
        )

    def _finish(self, job: _Job, verdict: Verdict) -> None:
        self._done.append((job.key, verdict))
        if job.cache_key is not None:
            repeated = replace(verdict, elapsed_s=0.0)
            self._done.extend((key, repeated) for key in self._waiting.pop(job.cache_key))
            if verdict.kind is not VerdictKind.ERROR:
                if len(self._cache) >= CACHE_SIZE:
                    self._cache.clear()
                self._cache[job.cache_key] = repeated

    def _replace(self, worker: _Worker, *, late: bool) -> None:
        """Ends a worker that is late or gone, judges its first job, requeues the others."""
        self._workers.remove(worker)
        self._selector.unregister(worker.socket)
        elapsed_s = time.monotonic() - worker.head_start
        status = worker.end()
        if not worker.is_ready:
            self._num_failed_starts += 1
            if self._num_failed_starts >= MAX_FAILED_STARTS:
                raise UserError(
                    f"a verifier worker ended with status {status} while starting, "
                    f"{MAX_FAILED_STARTS} times; see stderr, or raise memory_bytes "
                    f"({self._settings['memory_bytes']})"
                )
        elif worker.jobs and not worker.is_leaving:
            if late or status == -signal.SIGXCPU:
                verdict = Verdict(kind=VerdictKind.TIMEOUT, detail="killed", elapsed_s=elapsed_s)
            else:
                verdict = _error(f"the worker died with status {status}", elapsed_s)
            self._finish(worker.jobs.popleft(), verdict)
        self._queue.extendleft(reversed(worker.jobs))
        self._start_worker()


def _error(detail: str, elapsed_s: float = 0.0) -> Verdict:
    return Verdict(kind=VerdictKind.ERROR, detail=detail, elapsed_s=elapsed_s)
