"""Programs on several ranks, started as a user starts them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def torchrun(num_ranks: int, *words: Any) -> dict[str, Any]:
    """Returns what `subprocess` needs to start a program of ours, and its words, on some ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", num_ranks]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {
        "args": [str(word) for word in (sys.executable, *launcher, *words)],
        "cwd": ROOT,
        "env": os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        "text": True,
    }


def run_ranks(num_ranks: int, *words: Any, timeout: float) -> subprocess.CompletedProcess[str]:
    """Returns how a program on some ranks ended, with what they said."""
    return subprocess.run(**torchrun(num_ranks, *words), capture_output=True, timeout=timeout)
