"""`restem compare` as a user meets it: interrupted, gone on with, with an arm that fails."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from restem_lightning.completion_store import CompletionStore
from restem_lightning.loop.pool_cache import is_shared
from restem_lightning.run_dir import RunDir, read_json

ARMS = ("plain", "random")
SMALL = {
    "problems.validation": "null",
    "stop.rule": "none",
    "trainer.max_epochs": 1,
    "e_step.parity_completions": 0,
}


@pytest.fixture(scope="module")
def config(fit_words, tmp_path_factory):
    """The YAML of a small comparison; the arm `broken` has no verifier."""
    folder = tmp_path_factory.mktemp("compare")
    words = fit_words(folder, **SMALL)
    pairs = zip(words[3::2], words[4::2], strict=True)
    settings = {key[2:]: value for key, value in pairs if key != "--run_dir"}
    arms = {
        "plain": {},
        "random": {"settings": {"selection.select": "random", "selection.max_per_problem": 1}},
        "broken": {"settings": {"verifier": "nowhere"}},
    }
    path = folder / "compare.yaml"
    options = {"configs": [words[2]], "settings": settings, "arms": arms, "control": "plain"}
    options |= {"seeds": [3], "output": str(folder / "out")}
    path.write_text(yaml.safe_dump(options, sort_keys=False))
    return path


def start(config):
    command = [sys.executable, "-m", "restem_lightning", "compare", "--config", str(config)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def interrupted(config):
    """The first attempt: Ctrl-C as soon as the first arm has drawn something."""
    parts = config.parent / "out" / "plain" / "seed_3" / "iteration_1" / "completions"
    process = start(config)
    while not list(parts.glob("part-*.json")):
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err, {path: path.stat().st_ino for path in parts.iterdir()}


@pytest.fixture(scope="module")
def finished(config, interrupted):
    """The second attempt, to the end."""
    process = start(config)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def run_of(config, arm):
    return RunDir(config.parent / "out" / arm / "seed_3")


def test_ctrl_c_says_what_to_do_and_leaves_no_process(interrupted, config):
    code, _, err, _ = interrupted
    assert code == 130
    assert err.splitlines()[-1] == "restem compare: stopped; the same command goes on"
    log = (config.parent / "out" / "plain" / "seed_3.log").read_text()
    assert "restem fit: stopped" in log


def test_the_same_command_goes_on_where_it_was(finished, interrupted, config):
    assert run_of(config, "plain").finished_iterations() == [1]
    for path, inode in interrupted[3].items():
        assert path.stat().st_ino == inode  # kept, not drawn again


def test_arms_share_what_they_would_draw_alike(finished, config):
    stores = [CompletionStore(run_of(config, arm).iteration(1).completions) for arm in ARMS]
    first, second = ([part.path.read_bytes() for part in store.parts()] for store in stores)
    assert first == second
    assert [is_shared(store) for store in stores] == [False, True]


def test_the_table_has_the_base_model_and_each_arm_and_names_the_one_that_failed(finished, config):
    code, out, err = finished
    assert code == 1
    names = [line.split("  ")[0] for line in out.splitlines()]
    assert names[1:5] == ["arm", "base model", "plain", "random"]
    assert "restem compare: broken, seed 3: exit status 2: restem fit: error: verifier (nowh" in err
    written = read_json(config.parent / "out" / "comparison.json")
    assert list(written["arms"]) == ["base model", *ARMS]
    assert list(written["failed"]) == ["broken/seed_3"]
    metrics = read_json(run_of(config, "random").iteration(1).metrics)
    row = written["arms"]["random"]
    greedy = metrics["evaluation"]["held_out"]["greedy_pass@1"]["value"]
    assert row["metrics"]["greedy_pass@1"]["value"] == pytest.approx(greedy)
    assert row["budget"]["samples"] == 96
    assert row["budget"]["trained_on"] == metrics["e_step"]["num_accepted"]
    page = (config.parent / "out" / "comparison.html").read_text()
    assert "<td>random</td>" in page


def test_what_is_finished_is_not_run_again(finished, config, restem):
    log = config.parent / "out" / "random" / "seed_3.log"
    before = log.read_text()
    arms = yaml.safe_load(config.read_text())["arms"]
    del arms["broken"]
    result = restem("compare", "--config", config, "--arms", json.dumps(arms))
    assert result.code == 0
    assert "2 of 2 runs are finished already" in result.err
    assert log.read_text() == before


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--control", "nobody"), ["control (nobody)", "plain, random, broken"]),
        (("--seeds", "[]"), ["seeds ([])"]),
        (("--seeds", "[1, 1]"), ["seeds ([1, 1])", "once"]),
        (("--jobs", "0"), ["jobs (0)"]),
        (("--arms.plain.setting", "1"), ["setting"]),
    ],
)
def test_a_mistake_is_one_line(words, named, config, restem):
    result = restem("compare", "--config", config, *words)
    assert result.code == 2
    assert result.err.count("\n") == 1
    for name in named:
        assert name in result.err
