"""Sweeps: what W&B's agent makes of their YAML is a command line of ours; a trial is one run."""

import copy
import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from restem_lightning.fit import make_cli

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args")
ROOT = Path(__file__).parent.parent
SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))


def read(path):
    return yaml.safe_load(path.read_text())


def values_of(parameter):
    return parameter.get("values") or [parameter["min"], parameter["max"]]


def words_of_agent(sweep, parameters):
    """Returns the words of a trial, its macros filled in by W&B's own code as in its agent."""
    args = {"args": {name: {"value": value} for name, value in parameters.items()}}
    filled = create_sweep_command_args(args) | {
        "interpreter": ["python"], "program": [sweep["program"]], "env": ["/usr/bin/env"],
    }  # fmt: skip
    words = []
    for part in create_sweep_command(copy.copy(sweep["command"])):
        words += filled[part[2:-1]] if part.startswith("${") else [part]
    return words


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_a_grid_and_a_bayes_sweep_of_each_group_of_parameters():
    found = {(read(path)["method"], frozenset(read(path)["parameters"])) for path in SWEEPS}
    outer = frozenset({"iterations", "sampling.temperature"})
    inner = frozenset(
        {"sampling.n", "sampling.top_k", "selection.max_per_problem", "model.learning_rate"}
    )
    assert found == set(itertools.product(("grid", "bayes"), (outer, inner)))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_parameter_with_each_of_its_values_is_a_setting_of_fit(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    sweep = read(path)
    for name, parameter in sweep["parameters"].items():
        for value in values_of(parameter):
            words = words_of_agent(sweep, {name: value})
            assert words[:4] == ["/usr/bin/env", "python", "scripts/sweep.py", "fit"]
            config = make_cli(words[4:]).config
            assert config[name] == value
            assert type(config[name]) is type(value)  # 1e-4 without a point is text in YAML
            assert config.tracking.wandb_project == "restem"


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_any_choice_of_values_fits_together(path):
    parameters = read(path)["parameters"]
    least_n = min(values_of(parameters.get("sampling.n", {"values": [8]})))
    most = max(values_of(parameters.get("selection.max_per_problem", {"values": [3]})))
    assert most <= least_n


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_the_local_sweep_starts_a_trial_as_the_agent_does(path):
    sweep = read(path)
    parameters = {name: values_of(one)[0] for name, one in sweep["parameters"].items()}
    ours = script("sweep_local").expand(sweep["command"], sweep["program"], parameters, "python")
    assert ours == words_of_agent(sweep, parameters)


def test_the_local_sweep_names_metrics_as_w_and_b_has_them(tmp_path):
    for number, reward in ((1, 0.4), (2, 0.5)):
        folder = tmp_path / f"iteration_{number}"
        folder.mkdir()
        metrics = {"m_step": {"best_val_reward": reward}, "e_step": {"shared": False, "x": None}}
        (folder / "metrics.json").write_text(json.dumps(metrics))
        (folder / "manifest.json").write_text("{}")
    (tmp_path / "iteration_3").mkdir()
    found = script("sweep_local").last_metrics(tmp_path)
    assert found == {"iteration/m_step/best_val_reward": 0.5}
    assert all(read(path)["metric"]["name"] in found for path in SWEEPS)


# --- the launcher ---


@pytest.fixture
def cluster(tmp_path):
    """A folder for PATH with an `sbatch` that notes its words and does JOB, and `scancel`."""
    programs = {
        "sbatch": 'printf "%s\\n" "$@" > "$NOTES/sbatch"; eval "$JOB"',
        "scancel": 'printf "%s\\n" "$@" > "$NOTES/scancel"',
    }
    (tmp_path / "notes").mkdir()
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    return tmp_path


def launch(folder, *words, **environment):
    environment = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "NOTES": str(folder / "notes"),
        "SWEEPS": str(folder / "sweeps"),
        "WANDB_SWEEP_ID": "s1",
        "WANDB_RUN_ID": "r7",
        **environment,
    }
    command = [sys.executable, str(ROOT / "scripts" / "sweep.py"), *words]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def noted(folder, program):
    return (folder / "notes" / program).read_text().splitlines()


def test_a_trial_becomes_a_job_with_its_parameters_and_is_waited_for(cluster):
    start = time.monotonic()
    job = launch(
        cluster,
        *("fit", "--config", "a.yaml", "--sampling.temperature=0.9"),
        SWEEP_SBATCH="--nodes 2 --comment 'two words'",
        JOB="sleep 1; exit 75",
    )
    job.communicate(timeout=60)
    assert (job.returncode, time.monotonic() - start > 1) == (75, True)
    folder = cluster / "sweeps" / "s1"
    assert noted(cluster, "sbatch") == [
        *("--wait", "--job-name=restem-r7", f"--output={folder / 'r7.log'}"),
        *("--nodes", "2", "--comment", "two words", str(ROOT / "scripts" / "sweep.sbatch")),
        *("--config", "a.yaml", "--sampling.temperature=0.9", f"--run_dir={folder / 'r7'}"),
        *(f"--e_step.pool_cache={folder / 'pools'}", "--config", "configs/multinode.yaml"),
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_trial_that_the_agent_ends_has_its_job_cancelled(number, cluster):
    job = launch(cluster, "fit", SWEEP_SBATCH="", JOB="exec sleep 60")
    while not (cluster / "notes" / "sbatch").exists():
        assert job.poll() is None
        time.sleep(0.02)
    job.send_signal(number)
    job.communicate(timeout=60)
    assert job.returncode == 130
    assert noted(cluster, "scancel") == ["--name=restem-r7"]


def test_without_a_cluster_the_trial_runs_here(cluster):
    job = launch(cluster, "fit", "--config", "nowhere.yaml")
    _, err = job.communicate(timeout=120)
    assert job.returncode == 2
    assert "nowhere.yaml" in err
    assert not (cluster / "notes" / "sbatch").exists()


@pytest.mark.parametrize("changes", [{"WANDB_RUN_ID": ""}, {"WANDB_SWEEP_ID": ""}])
def test_without_an_agent_there_is_no_trial(changes, cluster):
    job = launch(cluster, "fit", **changes)
    assert "an agent starts this" in job.communicate(timeout=60)[1]
    assert job.returncode == 1
