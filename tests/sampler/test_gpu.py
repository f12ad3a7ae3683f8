"""What only a GPU has: captured graphs, a host that is behind, products of many shapes."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from restem_lightning.sampler import Request, SamplingParams

pytestmark = pytest.mark.gpu
PARAMS = SamplingParams(n=4, temperature=1.0, top_k=20, max_new_tokens=60)
SIZES = {
    "hidden_size": 256,
    "head_dim": 64,
    "intermediate_size": 512,
    "vocab_size": 1000,
    "max_position_embeddings": 2048,
}


@pytest.fixture
def requests(make_requests):
    return make_requests(range(1, 211, 7), preamble=70, n=[1 + k % 4 for k in range(30)])


@pytest.fixture
def on_gpu(make_policy, make_sampler):
    """Returns a function that builds a sampler on the GPU; the random model is larger here."""

    def make(family="llama", seed=0, **engine):
        engine = {"block_size": 16, "max_batch_size": 32, "cache_tokens": 16384} | engine
        return make_sampler(make_policy(family, seed=seed, **SIZES), device="cuda", **engine)

    return make


def tokens(samples):
    return {address: sample.token_ids for address, sample in samples.items()}


def test_captured_steps_draw_what_eager_steps_draw(on_gpu, requests, draw):
    captured, eager = on_gpu(), on_gpu()
    draw(eager, requests[:1], PARAMS)
    eager._machinery[1].graphs.device = torch.device("cpu")  # never captures
    expected = draw(eager, requests, PARAMS)
    for _ in range(2):  # the second run replays the graphs of the first
        assert draw(captured, requests, PARAMS) == expected
    assert len(captured._machinery[1].graphs.graphs) > 1
    assert not eager._machinery[1].graphs.graphs


def test_a_host_that_waits_for_each_step_draws_the_same(on_gpu, requests, draw):
    # Invariant, as other sequences are beside each other when an end is noticed at once.
    waiting = on_gpu(batch_invariant="on")
    waiting.lag = 0
    expected = draw(on_gpu(batch_invariant="on"), requests, PARAMS)
    assert draw(waiting, requests, PARAMS) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batch_invariance(dtype, on_gpu, requests, draw):
    engine = {"dtype": dtype, "batch_invariant": "on"}
    whole = draw(on_gpu(**engine), requests, PARAMS)
    assert draw(on_gpu(**engine), requests[::-1], PARAMS) == whole
    assert draw(on_gpu(**engine), [requests[7]], PARAMS).items() <= whole.items()
    preempted = on_gpu(**engine, cache_tokens=16 * 40)
    assert draw(preempted, requests, PARAMS) == whole
    assert preempted.num_preemptions > 0


def test_new_weights_in_place_keep_the_graphs_and_change_the_draws(on_gpu, requests, draw):
    sampler, fresh = on_gpu(seed=1), on_gpu(seed=2)
    before = draw(sampler, requests, PARAMS)
    graphs = dict(sampler._machinery[1].graphs.graphs)
    sampler.update_weights(fresh.module.state_dict().items())
    after = draw(sampler, requests, PARAMS)
    assert graphs.items() <= sampler._machinery[1].graphs.graphs.items()
    assert after == draw(fresh, requests, PARAMS)
    assert tokens(after) != tokens(before)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text"])
def test_bfloat16_log_probabilities_are_near_those_of_a_plain_forward(
    family, on_gpu, requests, draw
):
    sampler = on_gpu(family)
    samples = draw(sampler, requests, PARAMS)
    model = AutoModelForCausalLM.from_pretrained(
        sampler.module.config._name_or_path, dtype=torch.bfloat16, attn_implementation="eager"
    ).to("cuda")
    gaps = []
    for request in requests:
        for index in request.indices:
            sample = samples[request.request_id, index]
            ids = torch.tensor([[*request.prompt_ids, *sample.token_ids]], device="cuda")
            with torch.inference_mode():
                exact = model(ids).logits[0].float().log_softmax(-1)[len(request.prompt_ids) - 1 :]
            drawn = torch.tensor(sample.token_ids, device="cuda")[:, None]
            exact = exact[:-1].gather(1, drawn)[:, 0].cpu()
            gaps.append((torch.tensor(sample.logprobs).exp() - exact.exp()).abs())
    # As on the CPU: random models with large logits lose more to rounding than trained ones.
    assert torch.cat(gaps).mean() < 0.02


def test_nothing_waits_for_the_device(on_gpu, requests, draw):
    sampler = on_gpu()
    expected = draw(sampler, requests, PARAMS)
    fresh = on_gpu()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = list(fresh.generate(requests, PARAMS, seed=0, iteration=1))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert {(s.request_id, s.index) for s in got} == expected.keys()


def test_longer_completions_and_prompts_than_before_replace_the_graphs(
    on_gpu, requests, draw, prompt
):
    sampler = on_gpu(batch_invariant="on")
    before = draw(sampler, requests[:4], PARAMS)
    long = [Request(request_id="long", prompt_ids=prompt(1900), indices=(0, 1, 2))]
    draw(sampler, long, PARAMS)  # more blocks than a table had places for
    assert draw(sampler, requests[:4], PARAMS) == before
