"""How the time and memory of sampling grow with problems, n, prompt length and batch.

    python scripts/benchmarks/bench_growth.py
    python scripts/benchmarks/bench_growth.py --shape qwen2.5-1.5b --batch 512
    python scripts/benchmarks/bench_growth.py --e-step 240000 --mean-length 300

From one base case one number at a time is doubled; every case runs in a process of its own, so that
its peak memory is its own. --e-step says, from the rates in results/bench_sampler.jsonl, how long
an E-step of so many completions takes for each model and number of GPUs (it divides by the
number: ranks share nothing while they sample).
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from record import RESULTS, record

FACTORS = (1, 2, 4)
CASE = """
import json, resource, sys, tempfile, time
from argparse import Namespace
from pathlib import Path
import torch
from bench_sampler import Ours
from workloads import make_requests, save_random
settings = Namespace(**json.loads(sys.argv[1]))
torch.set_num_threads(settings.threads)
with tempfile.TemporaryDirectory() as name:
    save_random(settings.shape, Path(name), getattr(torch, settings.dtype))
    ours = Ours(Path(name), make_requests(None, settings), settings)
    start = time.perf_counter()
    tokens = ours.run(ours.requests, iteration=1)
    seconds = time.perf_counter() - start
    on_gpu = torch.cuda.is_available()
    memory = (
        torch.cuda.max_memory_allocated() / 2**20 if on_gpu
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    )
    print(json.dumps({"tokens": tokens, "seconds": seconds, "memory_mb": memory}))
"""


def measure(settings: dict[str, object]) -> dict[str, float]:
    """Returns tokens, seconds and peak memory in MiB of one case, run in its own process."""
    done = subprocess.run(
        [sys.executable, "-c", CASE, json.dumps(settings)],
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def grow(arguments: argparse.Namespace) -> None:
    """Runs and records the base case and each doubled one."""
    base = {
        "shape": "tiny" if arguments.quick else arguments.shape,
        "problems": 2 if arguments.quick else arguments.problems,
        "n": 2 if arguments.quick else 32,
        "preamble_tokens": 16 if arguments.quick else 400,
        "question_tokens": 8 if arguments.quick else 100,
        "new_tokens": 4 if arguments.quick else arguments.new_tokens,
        "batch": 8 if arguments.quick else arguments.batch,
        "dtype": "bfloat16",
        "threads": arguments.threads,
        "eos": False,
        "cache_tokens": 2048 if arguments.quick else 0,
        "batch_invariant": "auto",
        "kernels": "auto",
    }
    start = time.monotonic()
    print(f"{'what':18} {'value':>6} {'tokens':>8} {'seconds':>8} {'tokens/s':>9} {'MiB':>7}")
    for name in ("problems", "n", "preamble_tokens", "batch"):
        for factor in FACTORS:
            if time.monotonic() - start > arguments.seconds:
                print(f"{arguments.seconds} s are over; the rest is left out")
                return
            settings = base | {name: base[name] * factor}
            got = measure(settings)
            rate = got["tokens"] / got["seconds"]
            print(
                f"{name:18} {settings[name]:6} {got['tokens']:8} {got['seconds']:8.2f} "
                f"{rate:9.0f} {got['memory_mb']:7.0f}"
            )
            if not arguments.quick:
                settings |= {"grown": name, "memory_mb": round(got["memory_mb"])}
                record("bench_growth", name, settings, [rate], "tokens/s")


def plan(num_completions: int, mean_length: float) -> None:
    """Prints the hours of an E-step from the recorded rates, for 1, 8 and 64 devices."""
    rows = map(json.loads, (RESULTS / "bench_sampler.jsonl").read_text().splitlines())
    best: dict[tuple[str, str], float] = {}
    for row in rows:
        if row["case"] == "Sampler":
            model = row["arguments"].get("shape") or row["arguments"].get("policy") or "?"
            key = (model, row["gpu"] or f"{row['threads']} CPU threads")
            best[key] = max(best.get(key, 0.0), row["p50"])
    print(f"{num_completions:,} completions of {mean_length:.0f} tokens: hours on 1, 8, 64 devices")
    for (model, device), rate in sorted(best.items()):
        hours = num_completions * mean_length / rate / 3600
        print(
            f"{model:24} {device:24} {rate:9.0f} tokens/s "
            f"{hours:9.2f} {hours / 8:9.2f} {hours / 64:9.2f}"
        )


def main() -> None:
    """Grows one number at a time, or plans an E-step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="smollm2-135m", help="see bench_sampler.py")
    parser.add_argument("--problems", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=600, help="starts no case after so many")
    parser.add_argument("--quick", action="store_true", help="tiny model, nothing recorded")
    parser.add_argument("--e-step", type=int, metavar="COMPLETIONS", help="plan, measure nothing")
    parser.add_argument("--mean-length", type=float, default=300, help="tokens of a completion")
    arguments = parser.parse_args()
    if arguments.e_step:
        plan(arguments.e_step, arguments.mean_length)
    else:
        grow(arguments)


if __name__ == "__main__":
    main()
