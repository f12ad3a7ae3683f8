"""launch.sbatch on a real SLURM of two nodes: a run that is preempted ends like one that is not."""

import json
import os
import signal
from pathlib import Path

import pytest

from restem_lightning.run_dir import RunDir, read_json
from tests.slurm.conftest import Job

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slurm
# Long enough in each stage for a signal to hit it.
CHANGES = {
    "problems.train.init_args.num": 40,
    "e_step.problems_per_part": 2,
    "e_step.parity_completions": 0,
    "engine.max_batch_size": 16,
    "data.batch_size": 4,
    "trainer.val_check_interval": 0.25,
    "stop.rule": "best",
    "walltime_reserve_s": 10,
}


@pytest.fixture(scope="session")
def words(fit_words):
    """What follows `launch.sbatch`."""

    def of(run_dir, **changes):
        made = fit_words(run_dir, **{**CHANGES, **changes})[1:]
        return [*made[:2], "--config", str(ROOT / "configs" / "multinode.yaml"), *made[2:]]

    return of


@pytest.fixture(scope="session")
def whole(submit, words, tmp_path_factory):
    """A run on two nodes that nothing stops."""
    folder = tmp_path_factory.mktemp("whole")
    job = submit(words(folder / "run"), folder / "log")
    assert job.wait_for_end() == "COMPLETED", job.told()
    return RunDir(folder / "run")


def in_e_step(run):
    return any(run.iteration(1).completions.glob("part-*.json"))


def in_m_step(run):
    return any(run.iteration(1).m_step.glob("last-*.ckpt/meta.pt"))


def in_export(run):
    return (run.iteration(1).m_step / "m_step.json").exists()


def test_a_job_preempted_in_each_stage_ends_like_one_that_was_not(
    submit, words, whole, outcome, tmp_path
):
    run = RunDir(tmp_path / "run")
    tracked = {"tracking.wandb_project": "tests", "tracking.wandb_mode": "offline"}
    job = submit(words(run.path, **tracked), tmp_path / "log")
    stages = ((in_e_step, "USR1"), (in_m_step, "TERM"), (in_export, "USR1"))
    for number, (stage, name) in enumerate(stages, start=1):
        job.wait(lambda stage=stage: stage(run))
        assert not run.iteration(1).manifest.exists()
        job.call("scancel", "--signal", name, job.number)
        job.wait(lambda number=number: job.field("Restarts") == str(number))
    assert job.wait_for_end() == "COMPLETED", job.told()
    assert job.field("Restarts") == "3"
    kept = [line for line in job.log.read_text().splitlines() if "fit: stopped by" in line]
    assert len(kept) == 3, job.told()
    assert "of the E-step of iteration 1" in kept[0]
    assert "the M-step of iteration 1 up to last-" in kept[1]
    assert "the policy of iteration 1" in kept[2]
    assert outcome(run, 1) == outcome(whole, 1)
    names = {path.name.split("-")[-1] for path in run.path.glob("wandb/offline-run-*")}
    assert names == {read_json(run.run_json)["wandb_run_id"]}


def test_each_task_of_an_array_is_requeued_alone(submit, tmp_path):
    program = f"{ROOT / 'tests' / 'slurm' / 'rank.sh'}"
    options = ("--array", "1-2", "--nodes", "1")
    job = submit(["stops"], tmp_path / "log-%a", *options, RESTEM=program)
    for task in (1, 2):
        one = Job(f"{job.number}_{task}", tmp_path / f"log-{task}", job.environment)
        assert one.wait_for_end() == "COMPLETED", one.told()
        assert one.field("Restarts") == "1"


def test_the_status_of_the_rank_that_failed_is_the_jobs_and_requeues_nothing(submit, tmp_path):
    program = f"{ROOT / 'tests' / 'slurm' / 'rank.sh'}"
    job = submit(["fails", str(tmp_path)], tmp_path / "log", RESTEM=program)
    assert job.wait_for_end() == "FAILED", job.told()
    assert (job.field("ExitCode"), job.field("Restarts")) == ("2:0", "0")


@pytest.mark.slow
def test_a_job_stops_itself_before_its_time_is_up_and_is_requeued(
    submit, words, whole, outcome, tmp_path
):
    run = RunDir(tmp_path / "run")
    waiter = {"class_path": "tests.slurm.waiter.WaitForTheReserve", "init_args": {"reserve_s": 15}}
    changes = {"walltime_reserve_s": 15, "trainer.callbacks": json.dumps([waiter])}
    words = words(run.path, **changes)
    job = submit(words, tmp_path / "log", "--time", "1")
    assert job.wait_for_end(300) == "COMPLETED", job.told()
    assert job.field("Restarts") == "1"
    assert "stopped by the end of the allocation" in job.told()
    assert "M-step of iteration 1 up to last-3.ckpt" in job.told()
    assert outcome(run, 1) == outcome(whole, 1)


@pytest.mark.slow
def test_a_cancelled_job_is_not_requeued_and_goes_on_when_submitted_again(
    submit, words, whole, outcome, tmp_path
):
    run = RunDir(tmp_path / "run")
    job = submit(words(run.path), tmp_path / "log")
    job.wait(lambda: in_m_step(run))
    job.call("scancel", job.number)
    assert job.wait_for_end() == "CANCELLED"
    assert job.field("Restarts") == "0"
    assert not run.iteration(1).manifest.exists()
    again = submit(words(run.path), tmp_path / "log")
    assert again.wait_for_end() == "COMPLETED", again.told()
    assert outcome(run, 1) == outcome(whole, 1)


@pytest.mark.slow
def test_a_killed_rank_is_named_with_its_node_and_the_run_can_go_on(
    submit, words, whole, outcome, tmp_path
):
    run = RunDir(tmp_path / "run")
    for stage, rank, kept in ((in_e_step, 1, "E-step"), (in_m_step, 0, "M-step")):
        log = tmp_path / f"log-{rank}"
        job = submit(words(run.path), log)
        job.wait(lambda stage=stage: stage(run))
        os.kill(job.process_of(rank), signal.SIGKILL)
        assert job.wait_for_end() == "FAILED", job.told()
        assert job.field("Restarts") == "0"
        (line,) = [line for line in job.told().splitlines() if line.startswith("restem fit: rank")]
        node = "127.0.0.1" if rank == 0 else "n2"  # with rank 0 the store of their names is lost
        assert line.startswith(f"restem fit: rank {rank} (node {node}) was lost"), job.told()
        assert f"the {kept} of iteration 1" in line
        assert "go on with: restem fit" in line
        assert "launch.sbatch: a rank was lost" in job.told()
    again = submit(words(run.path), tmp_path / "log")
    assert again.wait_for_end() == "COMPLETED", again.told()
    assert outcome(run, 1) == outcome(whole, 1)
