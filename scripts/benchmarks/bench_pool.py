"""Time and memory of all that handles completions between sampling and training, by their number.

    python scripts/benchmarks/bench_pool.py                    # the paper's 7,500 x 32, and a tenth
    python scripts/benchmarks/bench_pool.py --problems 750000  # a hundred times the paper's

Synthetic completions go through the parts of a pool, its checksums, the selection, the index of the
M-step's packing and the metrics. Each stage runs in a process of its own, so that its peak memory
is its own; the figures are per million completions.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import record

N = 32
PROBLEMS_PER_PART = 256
CORRECT_SHARE = 0.5


def write_parts(folder: Path, num_problems: int, tokens: int) -> None:
    """Writes the pool, part by part, as an E-step does."""
    from restem_lightning.completions import Completion, CompletionStore, Verdict, VerdictKind

    rng, store = random.Random(0), CompletionStore(folder / "completions")
    prompt = [rng.randrange(50_000) for _ in range(tokens)]
    for start in range(0, num_problems, PROBLEMS_PER_PART):
        part = []
        for problem in range(start, min(start + PROBLEMS_PER_PART, num_problems)):
            for index in range(N):
                ids = [rng.randrange(50_000) for _ in range(rng.randint(tokens // 2, tokens))]
                is_right = rng.random() < CORRECT_SHARE
                part.append(
                    Completion(
                        iteration=1,
                        problem_id=f"problem/{problem:08}",
                        completion_index=index,
                        seed=0,
                        prompt_ids=prompt,
                        completion_ids=ids,
                        text=f"{ids[0]} + {ids[1]} = {ids[0] + ids[1]}\n#### {ids[0] + ids[1]}",
                        logprobs=[-0.5] * len(ids),
                        sampling_logprobs=[-0.25] * len(ids),
                        finish_reason="eos",
                        policy_hash="0" * 64,
                        sampling="{}",
                        verdict=Verdict(
                            kind=VerdictKind.CORRECT if is_right else VerdictKind.WRONG,
                            extracted=str(ids[0] + ids[1]),
                        ),
                        verifier="synthetic/1",
                    )
                )
        store.write_part(start // PROBLEMS_PER_PART, part)


def check(folder: Path, *_: int) -> None:
    """Compares every part with its checksum."""
    from restem_lightning.completions import CompletionStore

    CompletionStore(folder / "completions").verify_checksums()


def select(folder: Path, *_: int) -> None:
    """Selects at most 10 a problem, distinct ones, and writes the accepted dataset."""
    from restem_lightning.completions import CompletionStore
    from restem_lightning.selection import (
        SelectionParams,
        end_with_eos,
        select_completions,
        write_accepted,
    )

    selection = select_completions(
        CompletionStore(folder / "completions"), SelectionParams(dedupe="exact")
    )
    write_accepted(folder / "accepted.parquet", end_with_eos(selection.accepted, (1,)))


def pack(folder: Path, *_: int) -> None:
    """Reads the accepted dataset for training and packs the first 100 optimizer steps."""
    from restem_lightning.m_step import AcceptedDataModule

    data = AcceptedDataModule(str(folder / "accepted.parquet"), batch_size=64)
    for _, _step in zip(range(100), data.train_dataloader(), strict=False):
        pass


def measure_metrics(folder: Path, *_: int) -> None:
    """Computes pass@k and maj@k of the whole pool, as for an evaluation set."""
    from restem_lightning.loop.evaluate import EvaluationParams, measure

    (folder / "sampled").symlink_to(folder / "completions")
    measure(folder, EvaluationParams(greedy=False, n=N, ks=(1, 8, N)))


STAGES = {
    "write parts": write_parts,
    "checksums": check,
    "selection": select,
    "packing": pack,
    "metrics": measure_metrics,
}


def run_stage(stage: str, folder: str, num_problems: int, tokens: int) -> None:
    """Runs one stage in this process and prints its seconds and peak memory."""
    import restem_lightning.m_step  # noqa: F401  (what all stages import is not counted)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    STAGES[stage](Path(folder), num_problems, tokens)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": seconds, "grown_mb": (peak - before) / 1024, "mb": peak / 1024}))


def main() -> None:
    """Runs every stage for each number of problems."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", type=int, nargs="+", default=[750, 7500], help="sizes")
    parser.add_argument("--tokens", type=int, default=120, help="most of a completion")
    parser.add_argument("--quick", action="store_true", help="a tiny pool, nothing recorded")
    parser.add_argument("--stage", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        stage, folder, num_problems, tokens = arguments.stage
        run_stage(stage, folder, int(num_problems), int(tokens))
        return
    heads = ("completions", "seconds", "s/million", "peak MiB", "grown")
    print(f"{'stage':12}" + "".join(f"{head:>12}" for head in heads))
    for num_problems in [8] if arguments.quick else arguments.problems:
        with tempfile.TemporaryDirectory() as folder:
            for stage in STAGES:
                words = ["--stage", stage, folder, str(num_problems), str(arguments.tokens)]
                done = subprocess.run(
                    [sys.executable, __file__, *words],
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                )
                got = json.loads(done.stdout.splitlines()[-1])
                million = got["seconds"] / (num_problems * N / 1e6)
                print(
                    f"{stage:12}{num_problems * N:12,}{got['seconds']:12.1f}{million:12.1f}"
                    f"{got['mb']:12.0f}{got['grown_mb']:12.0f}",
                    flush=True,
                )
                if not arguments.quick:
                    settings = {"problems": num_problems, "n": N, "tokens": arguments.tokens}
                    settings |= {"peak_mb": round(got["mb"]), "grown_mb": round(got["grown_mb"])}
                    record("bench_pool", stage, settings, [got["seconds"]], "seconds")


if __name__ == "__main__":
    main()
