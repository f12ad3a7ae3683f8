"""Each method of configs/methods: where it is from, its data path by hand, and a run of it."""

import json
import re
import shlex
from pathlib import Path

import pytest

from restem_lightning.run_dir import RunDir, read_json

# LightningCLI warns of words given beside those of pytest's own command line.
pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args")
ROOT = Path(__file__).parent.parent
QUICKSTART, FOLDER = ROOT / "configs" / "quickstart.yaml", ROOT / "configs" / "methods"
METHODS = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != "small")
TINY = {
    "problems.train.init_args.num": 12,
    "problems.validation.init_args.num": 6,
    "problems.held_out.held_out.init_args.num": 4,
    "sampling.max_new_tokens": 60,
    "engine.device": "cpu",
    "engine.max_batch_size": 128,
    "engine.cache_tokens": 16384,
    "e_step.parity_completions": 0,
    "evaluation.n": 0,
    "trainer.accelerator": "cpu",
    "trainer.devices": 1,
    "trainer.enable_progress_bar": "false",
    "trainer.max_steps": 2,
}


def parsed(method, *words):
    from restem_lightning.fit import make_cli

    configs = (QUICKSTART, FOLDER / f"{method}.yaml")
    return make_cli([w for c in configs for w in ("--config", str(c))] + [str(w) for w in words])


def words_on_the_embedded_model(method):
    """The words that the file's own comment gives behind `Embedded model:`."""
    text = (FOLDER / f"{method}.yaml").read_text()
    comment = re.search(r"^# Embedded model: (.*\n(?:#   .*\n)*)", text, re.M)[1]
    words = comment.replace("\n#", " ").strip()
    return [] if words == "nothing else" else shlex.split(words)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_names_its_source_and_real_settings_that_the_source_leaves_open(method):
    text = (FOLDER / f"{method}.yaml").read_text()
    assert re.search(r"^# Source: \S", text, re.M)
    open_fields = re.search(r"^# Left open by the source: (.*\n(?:#   .*\n)*)", text, re.M)[1]
    names = re.findall(r"\b[a-z_]+\.[a-z_]+\b|\biterations\b|\bstart_from\b", open_fields)
    cli = parsed(method)
    assert names
    for name in names:
        assert name in cli.config, name


@pytest.mark.parametrize("method", METHODS)
def test_a_method_runs_on_the_embedded_model(method, restem, tmp_path):
    run = RunDir(tmp_path / "run")
    words = ["fit"]
    for config in ("quickstart.yaml", f"methods/{method}.yaml", "methods/small.yaml"):
        words += ["--config", ROOT / "configs" / config]
    words += words_on_the_embedded_model(method)
    settings = dict(TINY, run_dir=run.path)
    cli = parsed(method)
    if "trainer.max_steps" in cli.config.per_iteration:
        settings["per_iteration.trainer.max_steps"] = [2]
    settings["iterations"] = min(int(cli.config.iterations), 3)
    for key, value in settings.items():
        words += [f"--{key}", json.dumps(value) if isinstance(value, list) else value]
    result = restem(*words)
    assert result.code == 0, result.err
    finished = run.finished_iterations()
    assert 1 <= len(finished) <= settings["iterations"]
    for iteration in finished:
        metrics = read_json(run.iteration(iteration).metrics)
        assert metrics["m_step"]["optimizer_steps"] > 0
        assert metrics["e_step"]["num_trained_on"] > 0
