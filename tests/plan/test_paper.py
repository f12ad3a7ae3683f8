"""Rates on paper: 7B on H100s, worked out by hand."""

from dataclasses import replace

import pytest

from restem_lightning.errors import UserError
from restem_lightning.plan.costs import Volume
from restem_lightning.plan.paper import DEVICES, Decoding, Shape, Training, rates_on_paper

SEVEN_B = Shape(num_parameters=7.6e9, num_layers=28, hidden_size=3584, kv_bytes=57344)
VOLUME = Volume(
    iterations=3,
    num_problems=7500,
    n=32,
    max_per_problem=10,
    max_epochs=4,
    completions={"greedy": 640, "validation": 200},
    looks=5,
    num_ranks=64,
)
DECODING = Decoding(
    batch=512,
    cache_tokens=0,
    cache_share=0.85,
    validation_cache_tokens=65536,
    completion_tokens=512,
    acceptance_rate=0.5,
    parity=True,
)
TRAINING = Training(
    batch_size=64,
    prompt_tokens=188,
    step_tokens=700,
    micro_batches=1,
    micro_batch_tokens=700,
    parameter_bytes=4,
    gathered_bytes=2,
    sharded=True,
    reshard=True,
    checkpointing=True,
    devices_per_node=8,
)
ALONE = replace(VOLUME, num_ranks=1)


def on_paper(volume=VOLUME, decoding=DECODING, training=TRAINING, device="h100"):
    return rates_on_paper(volume, SEVEN_B, decoding, training, device=device)


def step_s(rates, volume=VOLUME):
    """The seconds of an optimizer step of 64 sequences of 700 tokens, from its rate."""
    return 64 * 700 / volume.num_ranks / rates.training_tokens_per_s


def test_a_decode_step_multiplies_while_it_reads_the_weights_and_reads_own_keys():
    step = 2 * 7.6e9 * 512 / (0.6 * 989e12) + 512 * 256 * 57344 / (0.8 * 3.35e12) + 0.001
    assert on_paper().sampling["e_step"].tokens_per_s == pytest.approx(512 / step)


def test_a_few_completions_of_a_rank_take_the_time_of_reading_the_weights():
    step = (2 * 7.6e9 + 10 * 256 * 57344) / (0.8 * 3.35e12) + 0.001
    assert on_paper().sampling["greedy"].tokens_per_s == pytest.approx(10 / step)


def test_arithmetic_takes_eight_flops_a_parameter_with_checkpointing_and_six_without():
    for checkpointing, flops in ((True, 8), (False, 6)):
        training = replace(TRAINING, checkpointing=checkpointing, step_tokens=44800)
        expected = flops * 7.6e9 * 44800 / (0.4 * 989e12)
        assert step_s(on_paper(ALONE, training=training), ALONE) == pytest.approx(expected)


def test_what_prompts_share_is_not_computed_again():
    shared = replace(TRAINING, step_tokens=22400)
    whole = replace(TRAINING, step_tokens=44800)
    ratio = step_s(on_paper(ALONE, training=whole)) / step_s(on_paper(ALONE, training=shared))
    assert ratio == pytest.approx(2)


def test_a_short_step_of_many_ranks_takes_what_gathering_weights_and_gradients_takes():
    """Two gathers in bfloat16 and one float32 sum, through eight cards of 50 GB/s a node."""
    expected = 63 / 64 * (2 + 2 + 4) * 7.6e9 / (0.8 * 400e9)
    rates = on_paper()
    assert step_s(rates) == pytest.approx(expected)
    assert "bound by network" in rates.origin
    kept = replace(TRAINING, reshard=False, micro_batches=4, step_tokens=10)
    assert step_s(on_paper(training=kept)) == pytest.approx(expected * 6 / 8)
    four = replace(TRAINING, micro_batches=4, step_tokens=10)
    assert step_s(on_paper(training=four)) == pytest.approx(4 * expected)


def test_within_a_node_the_ranks_exchange_over_nvlink():
    node = replace(VOLUME, num_ranks=8)
    expected = 7 / 8 * 2 * 4 * 7.6e9 / (0.8 * 450e9)
    ddp = replace(TRAINING, sharded=False, step_tokens=10)
    assert step_s(on_paper(node, training=ddp), node) == pytest.approx(expected)


def test_the_quota_bounds_what_is_accepted():
    assert on_paper().accepted_per_problem == 10
    few = replace(DECODING, acceptance_rate=0.1)
    assert on_paper(decoding=few).accepted_per_problem == pytest.approx(3.2)


def test_fsdp_shards_the_states_and_ddp_does_not():
    """7.6 billion parameters with 16 bytes each do not fit one 80 GB GPU, and do on 8 nodes."""
    card = DEVICES["h100"].memory_bytes
    assert on_paper(ALONE).memory_bytes > card
    assert on_paper(training=replace(TRAINING, sharded=False)).memory_bytes > card
    assert on_paper().memory_bytes < card


def test_the_samplers_cache_takes_its_share_of_what_the_weights_leave():
    weights = 1.5e9 + 2 * 7.6e9
    assert on_paper().memory_bytes == pytest.approx(weights + 0.85 * (80e9 - weights))


def test_d_val_is_sampled_beside_the_states_of_the_m_step():
    small = replace(DECODING, cache_tokens=1000, validation_cache_tokens=1000)
    sampling = 2 * 7.6e9 + 1000 * 57344
    training = 16 * 7.6e9 / 64 + 700 * 3584 * 28 * 2
    assert on_paper(decoding=small).memory_bytes == pytest.approx(1.5e9 + training + sampling)
    without = replace(VOLUME, completions={"greedy": 640})
    assert on_paper(without, small).memory_bytes == pytest.approx(1.5e9 + sampling)


def test_an_unknown_device_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"device \(tpu\) must be one of a100, h100, h200"):
        on_paper(device="tpu")
