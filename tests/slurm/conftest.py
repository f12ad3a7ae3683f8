"""A two-node SLURM cluster on this host, and the jobs that tests run on it."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "dev_slurm.sh"
PORT = 17400  # not that of a cluster that somebody tries things on
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves the tests of this folder out where there can be no cluster."""
    reason = None
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        reason = "needs root to start SLURM's daemons (scripts/dev_slurm.sh)"
    elif not (shutil.which("apt-get") or shutil.which("slurmctld", path="/usr/sbin:/usr/bin")):
        reason = "needs SLURM, or apt-get to install it (scripts/dev_slurm.sh)"
    for item in items:
        if reason and item.get_closest_marker("slurm"):
            item.add_marker(pytest.mark.skip(reason=reason))


class Job:
    """A job of launch.sbatch: what state it is in, and how to disturb it."""

    def __init__(self, number: str, log: Path, environment: dict[str, str]):
        self.number, self.log, self.environment = number, log, environment

    def call(self, *words: str) -> str:
        done = subprocess.run(
            words, env=self.environment, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def field(self, name: str) -> str:
        """A field of `scontrol show job`."""
        fields = self.call("scontrol", "show", "job", self.number).split()
        return next(field for field in fields if field.startswith(f"{name}=")).split("=")[1]

    def process_of(self, rank: int) -> int:
        """The process of a rank; those of its verifiers came later."""
        words = {f"SLURM_JOB_ID={self.number}", f"SLURM_PROCID={rank}", "SLURM_STEP_ID=0"}
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                is_of_it = words <= set((folder / "environ").read_text().split("\0"))
                if is_of_it and b"fit" in (folder / "cmdline").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
        return min(found)

    def wait(self, is_reached: Callable[[], bool], timeout_s: float = 150.0) -> None:
        """Waits for something; fails if the job ends before."""
        end, ask = time.monotonic() + timeout_s, time.monotonic()
        while not is_reached():
            assert time.monotonic() < end, self.told()
            if time.monotonic() > ask:
                ask = time.monotonic() + 1.0
                assert self.field("JobState") not in ENDED, self.told()
            time.sleep(0.01)

    def wait_for_end(self, timeout_s: float = 150.0) -> str:
        """Returns the state in which it has ended."""
        end = time.monotonic() + timeout_s
        while (state := self.field("JobState")) not in ENDED:
            assert time.monotonic() < end, self.told()
            time.sleep(0.2)
        return state

    def told(self) -> str:
        return self.log.read_text()[-9000:] if self.log.exists() else "no log"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[dict[str, str]]:
    """The environment in which sbatch finds the cluster."""
    state = tmp_path_factory.mktemp("slurm") / "state"
    environment = os.environ | {"DEV_SLURM": str(state), "PORT": str(PORT), "CPUS": "4"}
    started = subprocess.run(
        ["bash", SCRIPT, "start"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert started.returncode == 0, started.stderr
    yield environment | {
        "SLURM_CONF": str(state / "slurm.conf"),
        "MASTER_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "RESTEM": f"{sys.executable} -m restem_lightning",
    }
    subprocess.run(["bash", SCRIPT, "stop"], env=environment, check=True, timeout=60)


@pytest.fixture(scope="session")
def submit(cluster) -> Callable[..., Job]:
    """Submits `scripts/launch.sbatch` on both nodes; keywords go into its environment."""

    def run(words: list[str], log: Path, *options: str, **environment: str) -> Job:
        command = ["sbatch", "--parsable", "--nodes", "2", "--ntasks-per-node", "1"]
        command += ["--output", str(log), *options, "scripts/launch.sbatch", *words]
        environment = cluster | environment
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return Job(done.stdout.strip(), log, cluster)

    return run
