"""A plan is counts times rates; worked out by hand."""

from restem_lightning.plan.costs import Rates, Sampling, Volume, make_plan, shown


def volume(**changes):
    values = {
        "iterations": 3,
        "num_problems": 100,
        "n": 8,
        "max_per_problem": 2,
        "max_epochs": 4,
        "completions": {"greedy": 50, "sampled": 200, "validation": 20},
        "looks": 5,
        "num_ranks": 1,
    }
    return Volume(**values | changes)


def rates(**changes):
    one = Sampling(tokens=10, tokens_per_s=100, completion_bytes=2, token_bytes=0.5)
    values = {
        "origin": "by hand",
        "sampling": dict.fromkeys(("e_step", "greedy", "sampled", "validation"), one),
        "accepted_per_problem": 1.5,
        "accepted_tokens": 20,
        "prompt_tokens": 20,
        "training_tokens_per_s": 300,
        "policy_bytes": 1000,
        "checkpoint_bytes": 5000,
        "memory_bytes": 1e6,
        "load_s": 2,
    }
    return Rates(**values | changes)


def test_an_iteration_is_counts_times_rates():
    """A trained policy writes completions as long as those that it was trained on.

    One of 10 tokens takes 7 bytes and one of 20 takes 12, for not all of it grows with the tokens.
    """
    plan = make_plan(volume(), rates())
    first = {row.stage: row[1:] for row in plan.first}
    later = {row.stage: row[1:] for row in plan.later}
    assert first["E-step"] == (800, 8000, 80, 5600)
    assert later["E-step"] == (800, 16000, 160, 9600)
    assert first["M-step"] == later["M-step"] == (600, 24000, 80, 150 * 12 + 1000)
    assert first["D_val"] == (100, 2000, 20, 0)
    assert first["evaluation (greedy)"] == (50, 1000, 10, 600)
    assert plan.base[1][1:] == (200, 2000, 20, 1400)


def test_the_run_is_its_iterations_after_the_base_models_measures():
    plan = make_plan(volume(), rates())
    trained = 80 + 20 + 10 + 40
    assert plan.seconds == 25 + (80 + trained) + 2 * (160 + trained) + 7 * 2
    assert plan.drawn_tokens == 2500 + (8000 + 7000) + 2 * (16000 + 7000)
    kept = 2800 + 600 + 2400
    assert plan.disk_bytes == 1750 + (5600 + kept) + 2 * (9600 + kept)


def test_ranks_share_the_work_and_the_device_hours_stay():
    one, four = (
        make_plan(volume(), rates(load_s=0)),
        make_plan(volume(num_ranks=4), rates(load_s=0)),
    )
    assert four.seconds == one.seconds / 4
    assert four.device_hours == one.device_hours


def test_without_validation_problems_there_are_no_looks():
    plan = make_plan(volume(completions={"greedy": 50}), rates())
    assert [row.stage for row in plan.first] == ["E-step", "M-step", "evaluation (greedy)"]


def test_the_table_names_every_figure_with_its_unit():
    text = shown(make_plan(volume(), rates()))
    for part in (
        "800",
        "8,000",
        "80 s",
        "2 to 3, each",
        "15 min",
        "tokens drawn",
        "1.0 MB",
        "by hand",
    ):
        assert part in text
