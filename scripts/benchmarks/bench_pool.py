"""Time and memory of all that handles completions between sampling and training, by their number.

    python scripts/benchmarks/bench_pool.py                             # 7,500 x 32 and 10 times
    python scripts/benchmarks/bench_pool.py --problems 750000 --copied  # 100 times

Synthetic completions go through the parts of a pool, its checksums, the selection, the mixing with
an earlier iteration, the index of the M-step's packing and the metrics. Each stage runs in a
process of its own, so that its peak memory is its own; the figures are per million completions.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from record import record

if TYPE_CHECKING:
    from restem_lightning.completions import Completion

N = 32
PROBLEMS_PER_PART = 256
CORRECT_SHARE = 0.5


def write_parts(folder: Path, num_problems: int, tokens: int) -> np.ndarray:
    """Writes the pool, part by part, as an E-step does; returns `clock` of the writing alone."""
    from restem_lightning.completion_store import CompletionStore

    rng, store, seconds = (
        np.random.default_rng(0),
        CompletionStore(folder / "completions"),
        np.zeros(2),
    )
    prompt = rng.integers(0, 50_000, tokens).tolist()
    for start in range(0, num_problems, PROBLEMS_PER_PART):
        problems = range(start, min(start + PROBLEMS_PER_PART, num_problems))
        part = [
            make_completion(f"problem/{problem:08}", index, prompt, rng)
            for problem in problems
            for index in range(N)
        ]
        before = clock()
        store.write_part(start // PROBLEMS_PER_PART, part)
        seconds += clock() - before
    return seconds


def copy_parts(folder: Path, num_problems: int, tokens: int) -> None:
    """Writes the pool as copies of its first part under other problem ids, which is fast."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from restem_lightning.completion_store import CompletionStore
    from restem_lightning.completions import SCHEMA
    from restem_lightning.run_dir import sha256_of, write_json

    write_parts(folder, PROBLEMS_PER_PART, tokens)
    first = CompletionStore(folder / "completions").read()
    place = SCHEMA.get_field_index("problem_id")
    for index in range(1, num_problems // PROBLEMS_PER_PART):
        numbers = range(index * PROBLEMS_PER_PART, (index + 1) * PROBLEMS_PER_PART)
        problem_ids = [f"problem/{number:08}" for number in numbers]
        column = pa.array([one for one in problem_ids for _ in range(N)])
        path = folder / "completions" / f"part-{index:05d}.parquet"
        table = first.set_column(place, SCHEMA.field(place), column)
        pq.write_table(table, path, compression="zstd")
        entry = {"num_rows": first.num_rows, "sha256": sha256_of(path), "problem_ids": problem_ids}
        write_json(path.with_suffix(".json"), entry)


def clock() -> np.ndarray:
    """Returns seconds that passed, and those that this process computed."""
    return np.array([time.perf_counter(), time.process_time()])


def make_completion(
    problem_id: str, index: int, prompt: list[int], rng: np.random.Generator
) -> "Completion":
    """Returns a synthetic completion, at most as long as the prompt."""
    from restem_lightning.completions import Completion, Verdict, VerdictKind

    most = len(prompt)
    logprobs = -rng.random(rng.integers(most // 2, most + 1))
    ids = rng.integers(0, 50_000, len(logprobs)).tolist()
    kind = VerdictKind.CORRECT if rng.random() < CORRECT_SHARE else VerdictKind.WRONG
    return Completion(
        iteration=1,
        problem_id=problem_id,
        completion_index=index,
        seed=0,
        prompt_ids=prompt,
        completion_ids=ids,
        text=f"{ids[0]} + {ids[1]} = {ids[0] + ids[1]}\n#### {ids[0] + ids[1]}",
        logprobs=logprobs.tolist(),
        sampling_logprobs=logprobs.tolist(),
        finish_reason="eos",
        policy_hash="0" * 64,
        sampling="{}",
        verdict=Verdict(kind=kind, extracted=str(ids[0] + ids[1])),
        verifier="synthetic/1",
    )


def check(folder: Path, *_: int) -> None:
    """Compares every part with its checksum."""
    from restem_lightning.completion_store import CompletionStore

    CompletionStore(folder / "completions").verify_checksums()


def select(folder: Path, *_: int) -> None:
    """Selects at most 10 a problem, distinct ones, and writes the accepted dataset."""
    from restem_lightning.completion_store import CompletionStore
    from restem_lightning.selection import (
        SelectionParams,
        end_with_eos,
        stream_accepted,
        write_accepted,
    )

    store, params = CompletionStore(folder / "completions"), SelectionParams(dedupe="exact")
    accepted = stream_accepted(store, params, {})
    write_accepted(folder / "accepted.parquet", (end_with_eos(one, (1,)) for one in accepted))


def mix_earlier(folder: Path, *_: int) -> None:
    """Mixes the accepted dataset with an earlier one, of which nothing is new: it is the same."""
    from restem_lightning.loop.mixing import MixParams, mix
    from restem_lightning.selection import iter_accepted, write_accepted

    path, params = folder / "accepted.parquet", MixParams(earlier=True)
    mixed = mix(
        iter_accepted(path),
        params,
        problems=[],
        template=None,
        tokenizer=None,
        earlier=iter_accepted(path),
    )
    write_accepted(folder / "mixed.parquet", mixed)


def pack(folder: Path, *_: int) -> None:
    """Indexes the accepted dataset for training and packs the first 100 optimizer steps."""
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
    "copy parts": copy_parts,
    "checksums": check,
    "selection": select,
    "mixing": mix_earlier,
    "packing": pack,
    "metrics": measure_metrics,
}


def run_stage(stage: str, folder: str, num_problems: int, tokens: int) -> None:
    """Runs one stage in this process and prints its seconds and peak memory."""
    import restem_lightning.loop.evaluate  # noqa: F401  (what stages import is not counted)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = clock()
    inner = STAGES[stage](Path(folder), num_problems, tokens)
    seconds, cpu = (clock() - start if inner is None else inner).tolist()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    got = {"seconds": seconds, "cpu_s": cpu, "grown_mb": (peak - before) / 1024, "mb": peak / 1024}
    print(json.dumps(got))


def main() -> None:
    """Runs every stage for each number of problems."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", type=int, nargs="+", default=[7500, 75_000], help="sizes")
    parser.add_argument("--tokens", type=int, default=120, help="most of a completion")
    parser.add_argument("--copied", action="store_true", help="copies of one part, all stages else")
    parser.add_argument("--quick", action="store_true", help="a tiny pool, nothing recorded")
    parser.add_argument("--stage", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        stage, folder, num_problems, tokens = arguments.stage
        run_stage(stage, folder, int(num_problems), int(tokens))
        return
    heads = ("completions", "seconds", "s/million", "CPU s", "peak MiB", "grown")
    print(f"{'stage':12}" + "".join(f"{head:>12}" for head in heads))
    for num_problems in [8] if arguments.quick else arguments.problems:
        with tempfile.TemporaryDirectory() as folder:
            left_out = "write parts" if arguments.copied else "copy parts"
            for stage in [stage for stage in STAGES if stage != left_out]:
                words = ["--stage", stage, folder, str(num_problems), str(arguments.tokens)]
                done = subprocess.run(
                    [sys.executable, __file__, *words],
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                )
                got = json.loads(done.stdout.splitlines()[-1])
                million = got["seconds"] / (num_problems * N / 1e6)
                shown = (got["seconds"], million, got["cpu_s"], got["mb"], got["grown_mb"])
                numbers = "".join(f"{number:12.1f}" for number in shown)
                print(f"{stage:12}{num_problems * N:12,}{numbers}", flush=True)
                if not arguments.quick:
                    settings = {"problems": num_problems, "n": N, "tokens": arguments.tokens}
                    settings |= {"copied": arguments.copied}
                    settings |= {"cpu_s": round(got["cpu_s"], 1)}
                    settings |= {"peak_mb": round(got["mb"]), "grown_mb": round(got["grown_mb"])}
                    record("bench_pool", stage, settings, [got["seconds"]], "seconds")


if __name__ == "__main__":
    main()
