"""One trial of a W&B sweep, run here or as a SLURM job that is waited for.

    wandb sweep configs/sweeps/iterations_temperature_grid.yaml
    wandb agent SWEEP_ID                                                                  # here
    SWEEP_SBATCH="--nodes 2 --ntasks-per-node 4 --gpus-per-node 4" wandb agent SWEEP_ID   # as jobs

The agent starts this script (`program` in the sweep's YAML) with `fit` and the trial's parameters.
It adds the run folder of the trial, SWEEPS/SWEEP_ID/RUN_ID (SWEEPS: a variable, or runs/sweeps),
and the folder of pools that all trials of the sweep share. With SWEEP_SBATCH, options of sbatch, it
submits scripts/sweep.sbatch with the same words and configs/multinode.yaml, all of which srun gives
to every rank, and waits for the job, over its requeues. The agent itself runs on one node that may
submit jobs, and needs no GPU. If the agent ends a trial, its job is cancelled.
"""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

BATCH_SCRIPT = Path(__file__).with_name("sweep.sbatch")
RANKS = "configs/multinode.yaml"


def main() -> None:
    """Runs the trial and exits as it does."""
    words = sys.argv[1:]
    sweep_id, run_id = os.environ.get("WANDB_SWEEP_ID"), os.environ.get("WANDB_RUN_ID")
    if words[:1] != ["fit"] or not (sweep_id and run_id):
        sys.exit("sweep.py: an agent starts this with `fit` and a trial's parameters; see its head")
    folder = Path(os.environ.get("SWEEPS", "runs/sweeps")) / sweep_id
    words += [f"--run_dir={folder / run_id}", f"--e_step.pool_cache={folder / 'pools'}"]
    options = os.environ.get("SWEEP_SBATCH")
    if options is None:
        os.execv(sys.executable, [sys.executable, "-m", "restem_lightning", *words])
    log = (folder / f"{run_id}.log").absolute()
    log.parent.mkdir(parents=True, exist_ok=True)
    words += ["--config", RANKS]
    sys.exit(run_job(words[1:], shlex.split(options), name=f"restem-{run_id}", log=log))


def run_job(words: list[str], options: list[str], *, name: str, log: Path) -> int:
    """Returns the exit status of a job once it has ended; cancels it if this process is ended.

    Args:
        words: of `restem fit`.
        options: of sbatch.
        name: of the job, known to no other.
        log: what the job prints goes there.
    """
    command = ["sbatch", "--wait", f"--job-name={name}", f"--output={log}", *options]
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    job = subprocess.Popen([*command, str(BATCH_SCRIPT), *words], start_new_session=True)
    try:
        return job.wait()
    except KeyboardInterrupt:
        subprocess.run(["scancel", f"--name={name}"], check=False)
        job.terminate()
        job.wait()
        return 130


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
