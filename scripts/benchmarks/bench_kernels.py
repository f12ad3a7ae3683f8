"""Microseconds of each kernel beside the plain ways to do the same, and the machine's limits.

    python scripts/benchmarks/bench_kernels.py
    python scripts/benchmarks/bench_kernels.py --only block_attention --seconds 300
    python scripts/benchmarks/bench_kernels.py --quick

Runs on one CUDA device, at the shapes of decode steps of seven models. The same run measures what
the machine can do: copy bandwidth, reads from the L2 cache, matrix products, and the time from one
kernel to the next in a CUDA graph. Each case is a CUDA graph of many runs between two events, so
the host has no part in it, and its inputs and outputs rotate through more memory than the L2 cache
has. Every line goes to results/bench_kernels.jsonl as soon as it is measured, with the bytes that
the case moves and their share of the copy bandwidth. --quick only shows that everything runs, with
tiny shapes, without a GPU under triton's interpreter.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from record import record

if TYPE_CHECKING:  # the cases define kernels, which main() has a word on first
    from kernel_cases import Case, Plan

TARGET_US = 3000.0  # of one graph
REPEATS = 20


def time_graph(case: "Case") -> list[float]:
    """Returns the microseconds of one run, measured several times over many runs each."""
    cache = torch.cuda.get_device_properties().L2_cache_size
    distinct = case.num_distinct_bytes or case.num_bytes
    num_sets = 1 if case.resident else min(256, 1 + 4 * cache // distinct)
    torch._dynamo.reset()  # each shape is compiled for itself, however many came before
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run = case.build(num_sets)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for i in (0, num_sets - 1, 0):  # compiles, then warms up; the last time is an estimate
        start.record()
        run(i)
        end.record()
        end.synchronize()
    rounds = max(1, round(TARGET_US / (1000 * start.elapsed_time(end) * num_sets)))
    graph, outputs = torch.cuda.CUDAGraph(), [None] * num_sets
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for i in range(num_sets):
                outputs[i] = run(i)  # kept, so that outputs rotate too
    values = []
    for repeat in range(3 + REPEATS):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if repeat >= 3:
            values.append(1000 * start.elapsed_time(end) / (rounds * num_sets))
    return values


def time_once(case: "Case") -> list[float]:
    """Returns the microseconds of a single run on the CPU."""
    run = case.build(1)
    start = time.perf_counter()
    run(0)
    return [1e6 * (time.perf_counter() - start)]


def all_cases(plan: "Plan") -> Iterator["Case"]:
    """Yields every case, what matters most first; the very first is the copy bandwidth."""
    from attention_cases import attention_cases, draw_cases
    from kernel_cases import (
        machine_cases,
        matmul_cases,
        norm_cases,
        rotate_cases,
        silu_cases,
        write_cases,
    )

    yield from machine_cases(plan)
    yield from draw_cases(plan)
    main, *others = [(rows, own) for rows in plan.attention_rows for own in plan.own_keys]
    for model in plan.models:
        yield from attention_cases(plan, model, *main)
    for rows in plan.rows:
        for cases in (matmul_cases, norm_cases, silu_cases, rotate_cases, write_cases):
            for model in plan.models:
                yield from cases(plan, model, rows)
        if rows == plan.rows[0]:
            for model in plan.models:
                for rows_and_own in others:
                    yield from attention_cases(plan, model, *rows_and_own)


def derived(case: "Case", microseconds: float, copy_bandwidth: float) -> dict[str, float]:
    """Returns what a time amounts to: GB/s, its share of the copy bandwidth, TFLOP/s."""
    rate = case.num_bytes / microseconds
    found = {
        "bytes": case.num_bytes,
        "gb_per_s": round(rate / 1000, 1),
        "share_of_copy": round(rate / copy_bandwidth, 4),
    }
    if case.num_flops:
        found["tflop_per_s"] = round(case.num_flops / microseconds / 1e6, 1)
    return found


def main() -> None:
    """Measures, prints and records one case after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="NAME", help="cases with this name, and the copy")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, nothing recorded")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no case later")
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not cuda and not arguments.quick:
        sys.exit("there is no CUDA device to measure on; --quick tries everything without one")
    if not cuda:
        os.environ["TRITON_INTERPRET"] = "1"  # read where kernels are defined: in the imports below
    from kernel_cases import FULL, TINY

    plan = TINY if arguments.quick else FULL
    if cuda:
        plan = replace(plan, device="cuda", dtype=torch.bfloat16)
    began, copy_bandwidth, failed, names = time.monotonic(), 0.0, 0, set()
    for case in all_cases(plan):
        names.add(case.name)
        if copy_bandwidth and arguments.only not in (None, case.name):
            continue
        if time.monotonic() - began > arguments.seconds:
            print(f"stopped after {arguments.seconds:.0f} seconds")
            break
        label = f"{case.name:17} {case.variant:36}"
        rest = " ".join(str(value) for value in case.arguments.values())
        try:
            values = time_graph(case) if cuda else time_once(case)
        except Exception as error:  # one case must not cost the others their time on the machine
            failed += 1
            print(f"{label} FAILED {rest}: {type(error).__name__}: {str(error)[:200]}", flush=True)
            continue
        median = statistics.median(values)
        copy_bandwidth = copy_bandwidth or case.num_bytes / median
        found = derived(case, median, copy_bandwidth)
        print(
            f"{label} {median:10.2f} us {found['share_of_copy']:7.1%} of copy  {rest}", flush=True
        )
        if not arguments.quick:
            settings = {"variant": case.variant, **case.arguments}
            record("bench_kernels", case.name, settings, values, "us", derived=found)
    else:
        if arguments.only not in (None, *names):
            sys.exit(f"--only {arguments.only}: no such case; there are {', '.join(sorted(names))}")
    if failed:
        sys.exit(f"{failed} cases failed")


if __name__ == "__main__":
    main()
