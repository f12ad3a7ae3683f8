r"""Verdicts of the math verifier per second, every one on another completion.

    python scripts/benchmarks/bench_verifiers.py --gsm8k DIR --math DIR

Every problem of the training split is judged on its own reference solution and on the next
problem's, in the calling process and by a pool of workers. No verdict is taken from the pool's
cache. Processor time is that of caller and workers together: on a busy machine it is what compares.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

from record import record

from restem_lightning.problems import GSM8K, MATH, Problem
from restem_lightning.verifiers import MathVerifier, VerifierPool, VerifierSpec

SPEC = VerifierSpec(class_path="restem_lightning.verifiers.MathVerifier")


def pairs_of(problems: list[Problem]) -> list[tuple[Problem, str]]:
    """Returns each problem with its own solution, and with its neighbour's."""
    texts = [problem.reference_solution or "" for problem in problems]
    neighbours = [*texts[1:], texts[0]]
    return [*zip(problems, texts, strict=True), *zip(problems, neighbours, strict=True)]


def cpu_s_of(process_id: int) -> float:
    """Returns the processor seconds that a process has used."""
    fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def single(pairs: list[tuple[Problem, str]]) -> tuple[float, float]:
    """Returns wall and processor seconds without any pool."""
    verifier = MathVerifier()
    verifier.warm_up()
    wall, cpu = time.perf_counter(), time.process_time()
    for problem, text in pairs:
        verifier.verify(problem, text)
    return time.perf_counter() - wall, time.process_time() - cpu


def pooled(pairs: list[tuple[Problem, str]], num_workers: int) -> tuple[float, float]:
    """Returns wall and processor seconds with a pool whose workers are all up."""
    with VerifierPool(SPEC, num_workers=num_workers) as pool:
        warm = Problem(problem_id="-", question="-", reference_answer="x")
        while not all(worker.is_ready for worker in pool._workers):
            pool.verify_all([(warm, rf"\boxed{{y_{time.monotonic_ns()}}}")])
        workers = [worker.process.pid for worker in pool._workers]
        wall, cpu = time.perf_counter(), time.process_time() + sum(map(cpu_s_of, workers))
        for index, (problem, text) in enumerate(pairs):
            pool.submit(index, problem, text)
            pool._cache.clear()
        num = sum(1 for _ in pool.drain())
        wall = time.perf_counter() - wall
        cpu = time.process_time() + sum(map(cpu_s_of, workers)) - cpu
    assert num == len(pairs), "a verdict for every completion"
    return wall, cpu


def main() -> None:
    """Measures each set alone and with the pool."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gsm8k", help="folder or file of GSM8K in its original format")
    parser.add_argument("--math", help="folder or file of MATH in its original format")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    for name, source in (("gsm8k", GSM8K), ("math", MATH)):
        if (path := getattr(arguments, name)) is None:
            continue
        pairs = pairs_of(source(path, "train").load())
        words = sum(len(text.split()) for _, text in pairs) / len(pairs)
        for case, measure in (
            ("single process", single),
            ("pool", lambda pairs: pooled(pairs, arguments.workers)),
        ):
            times = [measure(pairs) for _ in range(arguments.repeats)]
            walls = [len(pairs) / wall for wall, _ in times]
            cpu_us = [1e6 * cpu / len(pairs) for _, cpu in times]
            settings = {"set": name, "completions": len(pairs), "words": round(words, 1)}
            settings |= {"workers": arguments.workers if case == "pool" else 0}
            derived = {"cpu_us_per_verdict": round(min(cpu_us), 1)}
            record("bench_verifiers", case, settings, walls, "verdicts/s", derived=derived)
            print(
                f"{name:6} {case:15} {len(pairs):,} completions of {words:.0f} words:"
                f" {statistics.median(walls):,.0f} verdicts/s, {min(cpu_us):.1f} us of processor"
                " time each"
            )


if __name__ == "__main__":
    main()
