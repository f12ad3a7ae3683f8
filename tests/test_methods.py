"""Each method of configs/methods: where it is from, its data path by hand, and a run of it."""

import json
import math
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import yaml

from restem_lightning.completions import Verdict, VerdictKind, to_table
from restem_lightning.loop.mixing import mix
from restem_lightning.loop.quota import next_indices
from restem_lightning.problems import Problem
from restem_lightning.prompts import FewShotPrompt
from restem_lightning.run_dir import RunDir, read_json
from restem_lightning.selection import HINT, balance_score, select_completions, solved_problems
from restem_lightning.settings import EMBEDDED_POLICY, verifier_spec
from tests.factories import make_completion

# LightningCLI warns of words given beside those of pytest's own command line.
pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args")
ROOT = Path(__file__).parent.parent
QUICKSTART, FOLDER = ROOT / "configs" / "quickstart.yaml", ROOT / "configs" / "methods"
METHODS = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != "small")
CONTINUED = {"rest", "expert_iteration", "raft", "iml", "b_star"}  # the others start from the base
TINY = {
    "problems.train.init_args.num": 10,
    "problems.validation.init_args.num": 4,
    "problems.held_out.held_out.init_args.num": 4,
    "sampling.max_new_tokens": 48,
    "engine.device": "cpu",
    "engine.max_batch_size": 128,
    "engine.cache_tokens": 16384,
    "e_step.parity_completions": 0,
    "evaluation.n": 0,
    "trainer.accelerator": "cpu",
    "trainer.devices": 1,
    "trainer.enable_progress_bar": "false",
    "trainer.max_steps": 2,
    "trainer.val_check_interval": 1,
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
    cli, settings = parsed(method), yaml.safe_load(text)
    assert names
    for name in names:
        assert name in cli.config, name
        group, _, field = name.partition(".")
        is_set = field in settings.get(group, {}) if field else name in settings
        # Where a run goes on to a plateau, `iterations` is the most that it may take.
        assert not is_set or (name == "iterations" and cli.config.stop.at_plateau), name


@pytest.mark.parametrize("method", METHODS)
def test_a_method_runs_on_the_embedded_model_from_its_start_with_its_samplers(
    method, restem, tmp_path
):
    run, per_iteration = RunDir(tmp_path / "run"), parsed(method).config.per_iteration
    settings = dict(TINY, run_dir=run.path)
    settings["iterations"] = min(int(parsed(method).config.iterations), 2)
    if "reuse_pool" in per_iteration.get("draw", {}):
        settings["iterations"] = 3
    if "trainer" in per_iteration:
        settings["per_iteration.trainer"] = {"max_steps": [2]}
    if method.startswith("dart"):
        settings["sampling.n"] = 16
    if method == "b_star":
        settings["balance.temperatures"] = "[0.5, 1.0]"
    words = ["fit"]
    for config in ("quickstart.yaml", f"methods/{method}.yaml", "methods/small.yaml"):
        words += ["--config", ROOT / "configs" / config]
    words += words_on_the_embedded_model(method)
    for key, value in settings.items():
        words += [f"--{key}", json.dumps(value) if isinstance(value, dict) else value]
    result = restem(*words)
    assert result.code == 0, result.err
    finished = run.finished_iterations()
    assert 1 <= len(finished) <= settings["iterations"]
    for iteration in finished:
        metrics = read_json(run.iteration(iteration).metrics)
        assert metrics["m_step"]["optimizer_steps"] > 0
        assert metrics["e_step"]["num_trained_on"] > 0
        manifest = read_json(run.iteration(iteration).manifest)
        before = run.iteration(iteration - 1).policy
        previous = str(EMBEDDED_POLICY if iteration == 1 else before)
        start = previous if method in CONTINUED else str(EMBEDDED_POLICY)
        assert manifest["trained_from"] == start
        samplers = [str(EMBEDDED_POLICY)] if method == "rft_union" else []
        assert manifest["sampler_policies"] == [*samplers, previous]


def made(method, iteration=1, *words):
    return parsed(method, *words).build(iteration)


# The pool that the tests below work out by hand: (problem, index) -> verdict, answer, reward.
# easy has 12 right completions; hard has two wrong ones that agree and a right one; lost has none.
POOL = {("easy", index): (VerdictKind.CORRECT, "7", 1.0) for index in range(12)}
POOL |= {
    ("hard", 0): (VerdictKind.WRONG, "5", 0.0),
    ("hard", 1): (VerdictKind.WRONG, "5", 0.0),
    ("hard", 2): (VerdictKind.CORRECT, "6", 1.0),
    ("lost", 0): (VerdictKind.WRONG, "1", 0.0),
    ("lost", 1): (VerdictKind.NO_ANSWER, None, 0.0),
}
ALL_RIGHT = [*(("easy", index) for index in range(12)), ("hard", 2)]
PROBLEMS = [
    Problem(problem_id=name, question=f"{name}?", reference_solution=f"solution of {name}")
    for name in ("easy", "hard", "lost")
]


class Letters:
    """A tokenizer of one token a letter."""

    def encode(self, text, add_special_tokens=True):
        return [ord(letter) for letter in text]


def completion(address, kind, answer, reward, text=None, iteration=1, purpose=""):
    return make_completion(
        iteration=iteration,
        problem_id=address[0],
        completion_index=address[1],
        prompt_ids=[1, 2] if purpose == "" else [1, 2, 3],
        completion_ids=[9],
        text=text or f"text {address[1]}",
        purpose=purpose,
        verdict=Verdict(kind=kind, reward=reward, extracted=answer),
    )


def table(pool=None, **changes):
    return to_table([completion(key, *value, **changes) for key, value in (pool or POOL).items()])


def scored(rewards):
    """POOL with other rewards for some addresses."""
    return {key: (kind, answer, rewards.get(key, r)) for key, (kind, answer, r) in POOL.items()}


def trained_on(objects, pool=None, earlier=(), seed=0):
    """(iteration, problem, index) -> weight of what the M-step sees; human solutions are 0."""
    selection = replace(objects.selection, seed=seed)
    accepted = select_completions(table(pool), selection).accepted
    mixed = mix(
        [accepted], objects.mix, problems=PROBLEMS, template=FewShotPrompt(), tokenizer=Letters(),
        earlier=earlier,
    )  # fmt: skip
    rows = pa.concat_tables(mixed).to_pylist()
    return {(r["iteration"], r["problem_id"], r["completion_index"]): r["weight"] for r in rows}


def ones(addresses, iteration=1):
    return {(iteration, *address): 1.0 for address in addresses}


HUMAN = {(0, problem.problem_id, 0): 1.0 for problem in PROBLEMS}
FIRST_TEN = [*(("easy", index) for index in range(10)), ("hard", 2)]


@pytest.mark.parametrize("method", ["restem", "restem_code", "restem_3x", "distill"])
def test_rest_em_trains_on_the_right_ones_ten_a_problem_with_equal_weight(method):
    assert trained_on(made(method)) == ones(FIRST_TEN)


@pytest.mark.parametrize(
    ("method", "iterations", "n"),
    [("restem", 3, 32), ("restem_code", 2, 64), ("restem_3x", 1, 96), ("expert_iteration", 5, 4)],
)
def test_rounds_and_samples_are_those_of_the_source(method, iterations, n):
    config = parsed(method).config
    assert (config.iterations, config.sampling.n) == (iterations, n)


def test_distillation_draws_from_the_larger_policy_alone():
    assert made("distill").draw.names() == ["LARGER_POLICY"]
    assert parsed("distill").config.start_from == "base"


def test_one_completion_of_a_problem_is_picked_at_random():
    objects = made("restem_1_per_problem")
    picks = {key for seed in range(150) for key in trained_on(objects, seed=seed)}
    assert len(trained_on(objects)) == 2
    assert picks == {(1, *address) for address in ALL_RIGHT}


def test_the_human_control_sees_human_solutions_of_the_solved_problems_only():
    expected = {(0, "easy", 0): 1.0, (0, "hard", 0): 1.0}
    assert trained_on(made("human_1_per_problem")) == expected


def test_sft_draws_nothing_and_sees_all_human_solutions():
    objects = made("sft_human")
    assert objects.draw.num_problems == 0
    accepted = select_completions([], objects.selection).accepted
    mixed = pa.concat_tables(
        mix(
            [accepted],
            objects.mix,
            problems=PROBLEMS,
            template=FewShotPrompt(),
            tokenizer=Letters(),
        )
    )
    assert mixed["text"].to_pylist() == [f" solution of {p.problem_id}" for p in PROBLEMS]
    prompt = "Q: easy?\nA:"
    assert mixed["prompt_ids"].to_pylist()[0] == [ord(letter) for letter in prompt]


def test_random_selection_keeps_the_budget_of_each_problem_and_not_the_reward():
    objects, seen = made("random_selection"), set()
    for seed in range(30):
        found = trained_on(objects, seed=seed)
        names = [problem_id for _, problem_id, _ in found]
        assert (names.count("easy"), names.count("hard"), names.count("lost")) == (10, 1, 0)
        seen |= {index for _, problem_id, index in found if problem_id == "hard"}
    assert seen == {0, 1, 2}


def test_rest_clones_then_grows_twice_and_filters_by_a_rising_threshold():
    rewards = {("easy", i): i / 12 for i in range(12)} | {("hard", 0): 0.85, ("hard", 2): 0.3}
    above = {
        0.0: [*(("easy", i) for i in range(1, 12)), ("hard", 0), ("hard", 2)],
        0.7: [("easy", 9), ("easy", 10), ("easy", 11), ("hard", 0)],
        0.8: [("easy", 10), ("easy", 11), ("hard", 0)],
        0.9: [("easy", 11)],
        0.95: [],
    }
    cli = parsed("rest")
    steps = [cli.build(iteration) for iteration in range(1, 11)]
    assert [one.draw.num_problems for one in steps] == [0] + [None] * 9
    grows = [i for i, one in enumerate(steps, 1) if not one.draw.reuse_pool]
    assert grows == [1, 2, 7]
    thresholds = [0.0, 0.7, 0.8, 0.9, 0.95, 0.0, 0.7, 0.8, 0.9]
    for objects, threshold in zip(steps[1:], thresholds, strict=True):
        assert objects.start_from == "previous"
        expected = ones(above[threshold]) | HUMAN
        assert trained_on(objects, scored(rewards)) == expected


@pytest.mark.parametrize("method", ["star", "star_norat"])
def test_star_is_greedy_and_each_m_step_is_longer_than_the_last(method):
    cli = parsed(method)
    assert (cli.config.sampling.n, cli.config.sampling.temperature) == (1, 0.0)
    steps = [cli.config_of(iteration).trainer.max_steps for iteration in range(1, 6)]
    assert steps == [40, 48, 58, 69, 83]
    assert (cli.config.hint is not None) == (method == "star")


def test_star_trains_on_a_hinted_success_under_the_prompt_without_the_hint():
    objects = made("star")
    problem = Problem(problem_id="p", question="Why?", reference_answer="42")
    assert objects.hint.render(problem, None).text == "Q: Why? (42)\nA:\n"
    plain = [
        completion(("easy", 0), VerdictKind.CORRECT, "7", None),
        completion(("hard", 0), VerdictKind.WRONG, "5", None),
        completion(("lost", 0), VerdictKind.WRONG, "1", None),
    ]
    assert solved_problems(to_table(plain), objects.selection) == {"easy"}
    hinted = [
        completion(("hard", 1), VerdictKind.CORRECT, "6", None, purpose=HINT),
        completion(("lost", 1), VerdictKind.WRONG, "1", None, purpose=HINT),
    ]
    accepted = select_completions(to_table(plain + hinted), objects.selection).accepted
    rows = accepted.select(["problem_id", "completion_index", "prompt_ids", "weight"]).to_pylist()
    assert [tuple(row.values()) for row in rows] == [
        ("easy", 0, [1, 2], 1.0),
        ("hard", 1, [1, 2], 1.0),
    ]


@pytest.mark.parametrize("method", ["rft", "rft_union"])
def test_rft_keeps_one_right_variant_of_each_equation_list_beside_human_solutions(method):
    texts = {
        0: "3 + 4 = 7",
        1: "We add: 3 + 4 = 7 apples in all",  # same list, farther from the others kept
        2: "4 + 3 = 7",  # another order of operands is another list
        3: "3 + 4 = 7, so 7",
        4: "3 + 4 = 8, 8 - 1 = 7",  # right answer, wrong equation: reward 0
    }
    verifier = verifier_spec(parsed(method).config.verifier).build()
    problem = Problem(problem_id="easy", question="?", reference_answer="7")
    verdicts = {i: verifier.verify(problem, f"{text}\n#### 7") for i, text in texts.items()}
    assert [verdict.reward for verdict in verdicts.values()] == [1.0, 1.0, 1.0, 1.0, 0.0]
    pool = [
        completion(("easy", i), verdict.kind, "7", verdict.reward, text=texts[i])
        for i, verdict in verdicts.items()
    ]
    objects = made(method, 2)
    accepted = select_completions(to_table(pool), objects.selection).accepted
    # A variant replaces the kept one if it is farther from the other lists kept so far: 1 comes
    # before there is any, 3 behind it; in the second order 1 is the farthest of all.
    order = [pool[2], pool[0], pool[1], pool[3], pool[4]]
    renumbered = [replace(one, completion_index=i) for i, one in enumerate(order)]
    again = select_completions(to_table(renumbered), objects.selection).accepted
    assert accepted["completion_index"].to_pylist() == [2, 3]
    assert again["text"].to_pylist() == [texts[2], texts[1]]
    assert set(HUMAN) <= set(trained_on(objects))


def test_rft_draws_from_the_sft_model_and_trains_the_base_model():
    cli = parsed("rft")
    sft, rft = cli.build(1), cli.build(2)
    assert (sft.draw.num_problems, sft.mix.human) == (0, "all")
    assert (rft.draw.num_problems, rft.draw.names()) == (None, ["previous"])
    assert rft.start_from == "base"


def test_expert_iteration_keeps_all_right_ones_of_the_next_problems():
    objects = made("expert_iteration")
    assert trained_on(objects) == ones(ALL_RIGHT)
    assert objects.draw.num_problems == 1024


def test_raft_keeps_the_best_of_each_problem_whatever_its_reward():
    rewards = {("easy", 4): 1.5, ("hard", 1): 2.0, ("lost", 0): -3.0, ("lost", 1): -2.0}
    objects = made("raft", 2)
    expected = ones([("easy", 4), ("hard", 1), ("lost", 1)])
    assert trained_on(objects, scored(rewards)) == expected
    assert (objects.draw.num_problems, objects.start_from) == (2048, "previous")


def test_rwr_keeps_all_and_weighs_by_the_exponential_of_the_reward():
    found = trained_on(made("rwr", 1, "--selection.beta", 0.5), scored({("hard", 0): -1.0}))
    expected = {(1, *key): math.exp(2 * value[2]) for key, value in POOL.items()}
    expected[1, "hard", 0] = math.exp(-2.0)
    assert found == pytest.approx(expected, rel=1e-6)


def test_iml_weighs_by_the_reward_and_takes_one_optimizer_step():
    objects = made("iml")
    found = trained_on(objects, scored({("hard", 0): 0.25}))
    expected = {(1, *key): value[2] for key, value in POOL.items()} | {(1, "hard", 0): 0.25}
    assert found == expected
    assert objects.trainer.max_steps == objects.trainer.max_epochs == 1
    assert objects.start_from == "previous"


def test_v_star_pools_what_was_right_in_all_rounds_with_human_solutions():
    objects = made("v_star", 3)
    old = {("lost", 0): (VerdictKind.CORRECT, "2", 1.0), ("easy", 0): (VerdictKind.WRONG, "1", 0.0)}
    rows = [completion(key, *value, iteration=2) for key, value in old.items()]
    before = select_completions(to_table(rows), objects.selection).accepted
    human = mix(
        [before], objects.mix, problems=PROBLEMS, template=FewShotPrompt(), tokenizer=Letters()
    )
    expected = ones(ALL_RIGHT) | ones([("lost", 0)], iteration=2) | HUMAN
    assert trained_on(objects, earlier=human) == expected


def test_b_star_scores_a_threshold_by_how_many_are_kept_and_how_many_are_right():
    # Three problems, 6 wanted: (4 kept, 2 right), (8, 8), nothing kept.
    score = balance_score([(4, 2), (8, 8), (0, 0)], 6)
    assert score == pytest.approx((2 / 6 * 2 / 4 + 1 * 1 + 0) / 3)
    objects = made("b_star", 2)
    assert len(objects.balance.temperatures) == 8
    assert objects.balance.thresholds[::10] == (-1.0, 0.0, 1.0)
    assert objects.start_from == "previous"


def test_b_star_raises_the_count_of_a_problem_until_there_are_enough():
    words = ("--selection.max_per_problem", 2, "--selection.min_total", 8)
    found = trained_on(made("b_star", 2, *words), scored({("easy", 11): 1.9}))
    # 2 of easy and 1 of hard are 3; 7 of easy are the least that makes 8.
    assert found == ones([*(("easy", i) for i in range(6)), ("easy", 11), ("hard", 2)])


def test_dart_uniform_stops_at_the_quota_and_adds_human_solutions():
    objects = made("dart_uniform")
    assert trained_on(objects) == ones(ALL_RIGHT) | HUMAN
    assert objects.e_step.stop_at_quota
    right = [completion(("easy", i), VerdictKind.CORRECT, "7", 1.0) for i in range(40)]
    assert next_indices([], 2048, objects.selection) == tuple(range(40))
    assert next_indices(right[:39], 2048, objects.selection) == (39,)
    assert next_indices(right, 2048, objects.selection) == ()


def test_dart_prop2diff_gives_hard_problems_more_and_each_at_least_one():
    words = ("--selection.max_per_problem", 8, "--selection.probe", 3)
    objects = made("dart_prop2diff", 1, *words)
    # easy never fails: 1; hard fails in 2 of its first 3: 8 * 2/3 = 5.
    pool = POOL | {("hard", i): (VerdictKind.CORRECT, "6", 1.0) for i in range(3, 12)}
    expected = [("easy", 0), *(("hard", i) for i in range(2, 7))]
    assert trained_on(objects, pool) == ones(expected) | HUMAN
    hard = [completion(key, *value) for key, value in pool.items() if key[0] == "hard"]
    assert next_indices([], 100, objects.selection) == (0, 1, 2)
    assert next_indices(hard[:7], 100, objects.selection) == ()


def test_lmsi_goes_by_the_vote_and_never_by_the_verdict():
    # hard: 5 wins with two votes against the right 6; lost: the one vote wins.
    expected = ones([*(("easy", i) for i in range(12)), ("hard", 0), ("hard", 1), ("lost", 0)])
    assert trained_on(made("lmsi")) == expected
