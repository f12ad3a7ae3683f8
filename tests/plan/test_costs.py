"""A plan is counts times rates; worked out by hand."""

import pytest

from restem_lightning.plan.costs import (
    Learning,
    Rates,
    Sampling,
    Volume,
    make_plan,
    num_pairs,
    shown,
)
from restem_lightning.selection.buckets import BUCKET_BYTES

LEARNING = Learning(mixed_share=0.5, pairs=6, sequences=5, pair_s=0.2, sequence_s=0.01, load_s=4)
ONCE = {  # done once, whatever is drawn or trained on
    "start_s": 7,
    "load_s": 2,
    "parity_s": 3,
    "m_step_s": 5,
    "hand_over_s": 0.5,
    "checkpoint_s": 1,
}


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
        "waiting_bytes": 100,
        "training_tokens_per_s": 300,
        "policy_bytes": 1000,
        "checkpoint_bytes": 5000,
        "memory_bytes": 1e6,
        "learning": LEARNING,
        **dict.fromkeys(ONCE, 0),
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
    assert plan.base[2][1:] == (200, 2000, 20, 1400)


def test_the_run_is_its_iterations_after_the_base_models_measures():
    plan = make_plan(volume(), rates())
    trained = 80 + 20 + 10 + 40
    assert plan.seconds == 25 + (80 + trained) + 2 * (160 + trained)
    assert plan.drawn_tokens == 2500 + (8000 + 7000) + 2 * (16000 + 7000)
    kept = 2800 + 600 + 2400
    assert plan.disk_bytes == 1750 + (5600 + kept) + 2 * (9600 + kept)


def test_ranks_share_the_work_and_the_device_hours_stay():
    one, four = make_plan(volume(), rates()), make_plan(volume(num_ranks=4), rates())
    assert four.seconds == one.seconds / 4
    assert four.device_hours == one.device_hours


def test_without_validation_problems_there_are_no_looks():
    plan = make_plan(volume(completions={"greedy": 50}), rates())
    assert [row.stage for row in plan.first] == ["E-step", "M-step", "evaluation (greedy)"]


def test_what_is_done_once_counts_in_its_stage_however_many_ranks_there_are():
    """Loads, exports, a start, parity; 5 looks with weights handed over and a checkpoint each."""
    for num_ranks in (1, 4):
        bare = make_plan(volume(num_ranks=num_ranks), rates())
        plan = make_plan(volume(num_ranks=num_ranks), rates(**ONCE))
        own = {row.stage: row.seconds for row in bare.first}
        more = {row.stage: row.seconds - own.get(row.stage, 0) for row in plan.first}
        assert more == {
            "E-step": 2,
            "parity": 3,
            "M-step": 5 + 5 * 1,
            "D_val": 2 + 5 * 0.5,
            "evaluation (greedy)": 2,
            "evaluation (sampled)": 0,
        }
        assert plan.base[0][:4] == ("start", 0, 0, 7)
        assert plan.seconds - bare.seconds == 7 + 2 + 3 * sum(more.values())


def test_pairs_grow_with_the_square_of_the_pools_until_the_most():
    """50 of 100 problems have 6 pairs from one pool, 24 from two."""
    assert num_pairs(volume(), LEARNING, 1) == 300
    assert num_pairs(volume(), LEARNING, 2) == 1200
    assert num_pairs(volume(max_pairs_per_problem=10), LEARNING, 2) == 500


def test_a_verifier_is_scored_trained_exported_and_ranks_the_sampled_completions():
    plan = make_plan(volume(verifiers=(1, 2), pair_epochs=2), rates(checkpoint_s=1))
    bare = make_plan(volume(), rates(checkpoint_s=1))
    scored = [50 * 5 + 200, 50 * 10 + 200]
    seconds = [
        2 * num * 0.2 + 0.01 * more + 4 + 1 for num, more in zip((300, 1200), scored, strict=True)
    ]
    assert plan.verifiers == [
        ("verifier 1", 600, 0, seconds[0], 1000),
        ("verifier 2", 2400, 0, seconds[1], 1000),
    ]
    assert plan.seconds == bare.seconds + sum(seconds)
    assert plan.disk_bytes == bare.disk_bytes + 2 * 1000
    assert plan.drawn_tokens == bare.drawn_tokens


def test_ranks_share_the_pairs_and_their_reference_but_not_the_ranking():
    one, four = (
        make_plan(volume(verifiers=(1,), num_ranks=num_ranks), rates()).verifiers[0].seconds
        for num_ranks in (1, 4)
    )
    assert one - four == pytest.approx(0.75 * (300 * 0.2 + 0.01 * 250))


def test_checkpoints_lie_beside_the_token_ids_that_an_m_step_reads():
    """150 sequences of 28 bytes; 4 bytes for each token of 100 prompts and of 150 completions."""
    plan = make_plan(volume(), rates())
    assert plan.transient_bytes == 5000 + 150 * 28 + 4 * (100 * 20 + 150 * 20)


def test_what_waits_for_selection_is_on_disk_only_where_memory_does_not_hold_it():
    fits, spills = (
        make_plan(volume(), rates(waiting_bytes=factor * BUCKET_BYTES / 100)) for factor in (1, 2)
    )
    assert fits.transient_bytes < BUCKET_BYTES
    assert spills.transient_bytes == 2 * BUCKET_BYTES


def test_the_table_names_every_figure_with_its_unit():
    text = shown(make_plan(volume(verifiers=(3,)), rates(parity_s=3)))
    for part in (
        "800",
        "8,000",
        "80 s",
        "2 to 3, each",
        "parity",
        "verifier 3",
        "scores for best@k",
        "tokens drawn",
        "1.0 MB",
        "by hand",
    ):
        assert part in text


def test_the_table_says_what_it_does_not_count():
    assert "without" not in shown(make_plan(volume(), rates()))
    text = shown(make_plan(volume(not_counted=("hint", "mix")), rates()))
    assert "without   what hint, mix add or save" in text
