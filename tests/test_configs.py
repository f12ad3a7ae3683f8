from pathlib import Path

import pytest
import yaml

from restem_lightning.errors import UserError

# LightningCLI warns of words given beside those of pytest's own command line.
pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args")
ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def parse(*words):
    from restem_lightning.fit import make_cli

    return make_cli([str(word) for word in words])


def words_for(config):
    """An overlay names no problems of its own kind and stands behind the config that it changes."""
    settings = yaml.safe_load(config.read_text())
    is_whole = (
        "class_path" in settings.get("problems", {}).get("train", {}) and "policy" in settings
    )
    return ["--config", config] if is_whole else ["--config", QUICKSTART, "--config", config]


@pytest.mark.parametrize(
    "config",
    [c for c in CONFIGS if not {"sweeps", "compare"} & set(c.parts)],
    ids=lambda c: c.stem,
)
def test_every_config_parses_and_resolves(config):
    cli = parse(*words_for(config))
    settings = cli.settings()
    assert settings["problems"]["train"]["class_path"].startswith("restem_lightning.")
    assert "run_dir" not in settings


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.stem)
def test_every_config_begins_with_its_purpose(config):
    assert config.read_text().startswith("# ")


def test_the_quickstart_is_what_other_tests_and_the_documents_call_it():
    cli = parse("--config", QUICKSTART)
    assert cli.config.run_dir == "runs/quickstart"
    assert list(cli.config.problems.held_out) == ["held_out"]


@pytest.mark.parametrize("text", ["samplings: {n: 3}", "sampling: {m: 3}", "trainer: {epochs: 3}"])
def test_an_unknown_key_in_a_config_is_refused(text, tmp_path):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(text)
    with pytest.raises(UserError, match=r"not accept.*did you mean"):
        parse("--config", QUICKSTART, "--config", overlay)


def test_a_later_config_and_the_command_line_win(tmp_path):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("sampling: {n: 3}\nverifier: {class_path: procedural}")
    cli = parse("--config", QUICKSTART, "--config", overlay, "--sampling.top_k", 7)
    assert cli.config.sampling.n == 3
    assert cli.config.sampling.top_k == 7
    assert cli.config.verifier == {"class_path": "procedural"}
    assert (
        cli.config.sampling.temperature == parse("--config", QUICKSTART).config.sampling.temperature
    )


def test_shared_values_are_linked_to_where_they_are_needed():
    cli = parse("--config", QUICKSTART, "--policy", "some/folder", "--seed_everything", 5)
    assert cli.config.model.policy == "some/folder"
    assert cli.config.data.seed == 5
    assert cli.settings()["seed"] == 5


def test_one_setting_names_the_task_of_all_generated_problem_sets():
    procedural = ROOT / "configs" / "procedural.yaml"
    problems = parse("--config", procedural, "--problems.task", "spell_backward").config.problems
    sources = [problems.train, problems.validation, *problems.held_out.values()]
    assert [source.init_args.task for source in sources] == ["spell_backward"] * 3
    assert len({source.init_args.seed for source in sources}) == 3
    own = parse("--config", procedural, "--problems.validation.init_args.task", "gcd")
    assert own.config.problems.validation.init_args.task == "gcd"


def test_without_a_task_a_set_of_generated_problems_is_refused():
    from restem_lightning.problems import ReasoningGym

    with pytest.raises(UserError, match=r"task \(null\).*set problems.task"):
        ReasoningGym(seed=1, num=1)


def test_parallel_sizes_that_do_not_make_up_the_ranks_are_refused(tmp_path):
    from restem_lightning.fit import check_settings
    from restem_lightning.run_dir import RunDir

    sizes = ["--trainer.strategy.init_args.tensor_parallel_size", 2]
    words = ["--config", QUICKSTART, "--config", ROOT / "configs" / "multinode.yaml", *sizes]
    cli = parse(*words, "--trainer.devices", 2)  # 2 nodes x 2 devices = 2 x 2
    check_settings(cli.config, cli.build(1), RunDir(tmp_path), 1)
    cli = parse(*words, "--trainer.devices", 1)
    with pytest.raises(UserError, match=r"\(2\) times .* \(2\) must be .* \(2 = "):
        check_settings(cli.config, cli.build(1), RunDir(tmp_path), 1)


def test_what_tensor_parallelism_cannot_do_is_refused_before_the_e_step(tmp_path):
    from restem_lightning.fit import check_settings
    from restem_lightning.fit.checks import check_policies
    from restem_lightning.run_dir import RunDir
    from restem_lightning.settings import EMBEDDED_POLICY

    words = ["--config", QUICKSTART, "--config", ROOT / "configs" / "multinode.yaml"]
    sizes = ["--trainer.strategy.init_args.tensor_parallel_size", 2, "--trainer.devices", 2]
    cli = parse(*words, *sizes, "--model.compile", "true")
    with pytest.raises(UserError, match=r"model\.compile \(true\) .* tensor_parallel_size \(2\)"):
        check_settings(cli.config, cli.build(1), RunDir(tmp_path), 1)
    sizes[1] = sizes[3] = 5
    cli = parse(*words, *sizes)
    with pytest.raises(UserError, match=r"tensor_parallel_size \(5\) must divide"):
        check_policies(cli.config, str(EMBEDDED_POLICY))
