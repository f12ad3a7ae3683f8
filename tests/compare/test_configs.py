"""The comparisons in configs/compare: every arm is a run that `restem fit` would begin."""

from pathlib import Path

import pytest
import yaml

from restem_lightning.compare.arms import Arm, plan_runs
from restem_lightning.fit import check_settings, iterations_that_differ, make_cli
from restem_lightning.run_dir import RunDir

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args")
ROOT = Path(__file__).parent.parent.parent
COMPARISONS = {path.stem: yaml.safe_load(path.read_text())
               for path in sorted((ROOT / "configs" / "compare").glob("*.yaml"))}  # fmt: skip
ARMS = [(name, arm) for name, comparison in COMPARISONS.items() for arm in comparison["arms"]]
NOT_COMPARED = {"restem_code", "small"}


def words_of(name, arm):
    comparison = COMPARISONS[name]
    one = Arm(**(comparison["arms"][arm] or {}))
    runs = plan_runs(
        {arm: one},
        seeds=[0],
        configs=comparison["configs"],
        settings=comparison["settings"],
        output=Path(comparison["output"]),
    )
    return list(runs[0].words[1:])


@pytest.mark.parametrize(("name", "arm"), ARMS)
def test_every_arm_is_a_command_whose_settings_fit_together(name, arm, monkeypatch):
    monkeypatch.chdir(ROOT)
    cli = make_cli(words_of(name, arm))
    for iteration in iterations_that_differ(cli.config):
        made = cli.build(iteration)
        check_settings(cli.config, made, RunDir(cli.config.run_dir), iteration)
    assert cli.config.run_dir == f"runs/compare/{name}/{arm}/seed_0"
    assert COMPARISONS[name]["control"] in COMPARISONS[name]["arms"]


def test_every_method_of_this_domain_is_compared():
    methods = {path.stem for path in (ROOT / "configs" / "methods").glob("*.yaml")}
    configs = [path for one in COMPARISONS.values() for arm in one["arms"].values()
               for path in arm["configs"]]  # fmt: skip
    compared = {Path(path).stem for path in configs}
    assert methods - NOT_COMPARED == compared - {"small"}


def test_the_controls_differ_in_their_data_and_not_in_their_optimizer_steps(monkeypatch):
    monkeypatch.chdir(ROOT)
    steps = {
        arm: (config.trainer.max_steps, config.stop.rule, config.data.batch_size)
        for arm in COMPARISONS["controls"]["arms"]
        for config in [make_cli(words_of("controls", arm)).config]
    }
    assert len(set(steps.values())) == 1


def test_the_single_round_draws_as_many_completions_as_all_iterations(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name, one_round in (("controls", "one_round"), ("methods", "restem_3x")):
        configs = [make_cli(words_of(name, arm)).config for arm in ("restem", one_round)]
        drawn = [config.iterations * config.sampling.n for config in configs]
        assert drawn[0] == drawn[1]
        assert configs[1].iterations == 1
