"""A completion's tokens and log-probabilities are the same bits whatever else is in the batch.

On the CPU that holds by default; tests/sampler/test_gpu.py asks the same of a GPU.
"""

import random

import pytest
import torch

from restem_lightning.errors import UserError
from restem_lightning.sampler import Request, SamplingParams

PARAMS = SamplingParams(n=4, temperature=1.0, top_k=20, top_p=0.97, max_new_tokens=40)
FAMILIES = ("llama", "gemma2", "mistral")


@pytest.fixture
def requests(make_requests):
    return make_requests(range(1, 31, 3))


@pytest.fixture
def everything(requests, make_policy, make_sampler, draw):
    """Returns all completions by family, drawn together."""
    return lambda family: draw(make_sampler(make_policy(family)), requests, PARAMS)


@pytest.mark.parametrize("family", FAMILIES)
def test_order_of_requests_changes_nothing(
    family, everything, requests, make_policy, make_sampler, draw
):
    shuffled = random.Random(1).sample(requests, len(requests))
    assert draw(make_sampler(make_policy(family)), shuffled, PARAMS) == everything(family)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_requests", [1, 3, 7])
def test_other_numbers_of_rows_give_the_same_bits(
    dtype, num_requests, requests, make_policy, make_sampler, draw
):
    whole = draw(make_sampler(make_policy(), dtype=dtype, max_batch_size=40), requests, PARAMS)
    some = draw(make_sampler(make_policy(), dtype=dtype), requests[:num_requests], PARAMS)
    assert all(whole[address] == sample for address, sample in some.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_subset_draws_the_same_completions(
    family, everything, requests, make_policy, make_sampler, draw
):
    some = draw(make_sampler(make_policy(family)), [requests[7], requests[2]], PARAMS)
    whole = everything(family)
    assert len(some) == 8
    assert all(whole[address] == sample for address, sample in some.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_one_completion_can_be_replayed_alone(
    family, everything, requests, make_policy, make_sampler, draw
):
    sampler, whole = make_sampler(make_policy(family)), everything(family)
    for number, index in ((0, 3), (4, 0), (9, 2)):
        request = requests[number]
        alone = Request(
            request_id=request.request_id,
            prompt_ids=request.prompt_ids,
            num_shared=request.num_shared,
            indices=(index,),
        )
        address = (request.request_id, index)
        assert draw(sampler, [alone], PARAMS) == {address: whole[address]}


@pytest.mark.parametrize("family", FAMILIES)
def test_preempted_sequences_end_the_same(
    family, everything, requests, make_policy, make_sampler, draw
):
    sampler = make_sampler(make_policy(family), cache_tokens=8 * 24)
    assert draw(sampler, requests, PARAMS) == everything(family)
    assert sampler.num_preemptions > 0


def test_preempted_sequences_behind_a_prompt_that_enlarges_the_tables_end_the_same(
    make_policy, make_sampler, draw, prompt
):
    policy = make_policy(max_position_embeddings=1024)
    long = [Request(request_id="long", prompt_ids=prompt(600), indices=tuple(range(8)))]
    sampler = make_sampler(policy, cache_tokens=8 * (75 + 12))
    assert draw(sampler, long, PARAMS) == draw(make_sampler(policy), long, PARAMS)
    assert sampler.num_preemptions > 0


@pytest.mark.parametrize("lag", [1, 3])
@pytest.mark.parametrize("cache_tokens", [2048, 8 * 24])
def test_a_host_that_is_steps_behind_changes_nothing(
    lag, cache_tokens, everything, requests, make_policy, make_sampler, draw
):
    sampler = make_sampler(make_policy(), cache_tokens=cache_tokens)
    sampler.lag = lag
    assert draw(sampler, requests, PARAMS) == everything("llama")


def test_passes_of_full_size_give_the_same_completions(
    everything, requests, make_policy, make_sampler, draw
):
    sampler = make_sampler(make_policy(), prefill_tokens=64)
    sampler.full_passes = True  # what batch_invariant does where a row depends on their number
    assert draw(sampler, requests, PARAMS) == everything("llama")


@pytest.mark.parametrize("max_batch_size", [1, 9, 10, 15])
def test_batches_that_are_no_multiple_of_eight_change_nothing(
    max_batch_size, everything, requests, make_policy, make_sampler, draw
):
    sampler = make_sampler(make_policy(), max_batch_size=max_batch_size)
    assert draw(sampler, requests, PARAMS) == everything("llama")


def test_a_second_run_of_one_sampler_is_the_same(requests, make_policy, make_sampler, draw):
    sampler = make_sampler(make_policy())
    assert draw(sampler, requests, PARAMS) == draw(sampler, requests, PARAMS)


def test_ties_beside_a_row_do_not_change_it(make_policy, make_sampler, draw, prompt):
    # A vocabulary beyond the candidates' number takes the path with top-k candidates only.
    sampler = make_sampler(make_policy(vocab_size=512))
    with torch.no_grad():
        head = sampler.module.lm_head.weight
        head[256:] = head[:256]  # every logit has a twin
    requests = [
        Request(request_id=str(n), prompt_ids=prompt(n), indices=(0, 1)) for n in range(2, 9)
    ]
    params = SamplingParams(n=2, temperature=1.0, top_k=21, max_new_tokens=20)
    whole = draw(sampler, requests, params)
    for request in requests:
        for address, sample in draw(sampler, [request], params).items():
            assert whole[address] == sample


@pytest.mark.parametrize("part", ["seed", "iteration", "request_id"])
def test_every_part_of_the_address_changes_the_draws(part, make_policy, make_sampler, draw, prompt):
    sampler = make_sampler(make_policy())
    base = {"seed": 0, "iteration": 1, "request_id": "a"}
    drawn = []
    for address in (base, base | {part: "b" if part == "request_id" else 2}):
        request = Request(request_id=address.pop("request_id"), prompt_ids=prompt(9))
        samples = draw(sampler, [request], PARAMS, **address)
        drawn.append(next(iter(samples.values())).token_ids)
    assert drawn[0] != drawn[1]


def test_sizes_of_the_engine_change_no_token(requests, make_policy, make_sampler, draw):
    def tokens(**engine):
        samples = draw(make_sampler(make_policy(), **engine), requests[:4], PARAMS)
        return {address: sample.token_ids for address, sample in samples.items()}

    expected = tokens()
    for engine in (
        {"block_size": 5},
        {"block_size": 64, "max_batch_size": 40, "cache_tokens": 8192},
        {"max_batch_size": 1},
        {"batch_invariant": "off"},
        {"prefill_tokens": 24},
        {"threads": 2},
    ):
        assert tokens(**engine) == expected, engine


def test_a_cache_that_cannot_hold_one_completion_is_refused(
    requests, make_policy, make_sampler, draw
):
    sampler = make_sampler(make_policy(), cache_tokens=64)
    with pytest.raises(UserError, match=r"engine.cache_tokens \(64\) must hold"):
        draw(sampler, requests, PARAMS)
