"""One JSON line per benchmark case: what was run, on what, how fast, how much memory."""

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def commit() -> str:
    """Returns the commit of this checkout, with -dirty behind it if files differ from it.

    Where the files are without their history, the environment variable BENCH_COMMIT names it.

    Raises:
        SystemExit: neither; a number without a commit cannot be compared.
    """
    if named := os.environ.get("BENCH_COMMIT"):
        return named
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty"]
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        raise SystemExit(
            "benchmarks are recorded with their commit; run them in a git checkout or set "
            "BENCH_COMMIT"
        ) from None


def cpu_model() -> str:
    """Returns the processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def driver() -> str | None:
    """Returns the version of the NVIDIA driver, None without one."""
    if not torch.cuda.is_available() or (program := shutil.which("nvidia-smi")) is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.split("\n")[0].strip() or None


def versions() -> dict[str, str]:
    """Returns the versions of the libraries that make a difference, of those that are there."""
    found = {}
    for name in ("torch", "triton", "transformers", "flash-attn", "vllm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Returns p20, p50 and p80 of repeated measurements (all equal for a single one)."""
    if len(values) == 1:
        return dict.fromkeys(("p20", "p50", "p80"), values[0])
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return {"p20": cuts[1], "p50": cuts[4], "p80": cuts[7]}


def record(
    benchmark: str,
    case: str,
    arguments: Mapping[str, object],
    values: Sequence[float],
    unit: str,
    *,
    derived: Mapping[str, object] | None = None,
) -> dict[str, object]:
    """Appends one case to results/<benchmark>.jsonl and returns what was written.

    Args:
        benchmark: name of the script without .py.
        case: what was measured.
        arguments: everything that the case was run with.
        values: one measurement per repeat.
        unit: of the values, such as tokens/s.
        derived: what follows from the values, such as the share of the machine's bandwidth.
    """
    cuda = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    row = {
        "benchmark": benchmark,
        "case": case,
        "arguments": dict(arguments),
        "unit": unit,
        **{name: round(value, 3) for name, value in percentiles(values).items()},
        **(derived or {}),
        "repeats": len(values),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "driver": driver(),
        "versions": versions(),
        # Of the whole process so far, as Linux counts it: kilobytes.
        "peak_memory_mb": round(
            (peak / 2**20) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        ),
    }
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{benchmark}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    return row
