"""The sampler runs the model that transformers runs."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from restem_lightning.sampler import Request, SamplingParams

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text")
LENGTHS = (1, 7, 8, 9, 16, 17, 30)  # around the ends of blocks of 8
EOS = 1


def load(policy, dtype=torch.float32):
    # Eager: the only plain attention of transformers that knows Gemma 2's softcapping.
    return AutoModelForCausalLM.from_pretrained(
        policy, dtype=dtype, attn_implementation="eager"
    ).eval()


def greedy(model, prompt_ids, max_new_tokens):
    ids = torch.tensor([prompt_ids])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens
    )
    return tuple(out[0, len(prompt_ids) :].tolist())


@torch.inference_mode()
def forward_logprobs(model, prompt_ids, token_ids):
    """Returns the log-probabilities [tokens, V] at which each token was drawn, at T=1."""
    logits = model(torch.tensor([[*prompt_ids, *token_ids]])).logits[0].float()
    return logits.log_softmax(-1)[len(prompt_ids) - 1 : -1]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_completions_equal_those_of_transformers(
    family, make_policy, make_sampler, draw, prompt
):
    policy = make_policy(family)
    preambles = {0: (), 5: prompt(5), 8: prompt(8)}  # with, without and at the end of a block
    requests = [
        Request(
            request_id=f"{num_shared}-{length}",
            prompt_ids=(*preamble, *prompt(length)),
            num_shared=num_shared,
            indices=(0, 1, 2) if length == 9 else (0,),
        )
        for num_shared, preamble in preambles.items()
        for length in LENGTHS
    ]
    params = SamplingParams(n=1, temperature=0, max_new_tokens=24)
    got = draw(make_sampler(policy), requests, params)
    assert len(got) == len(preambles) * (len(LENGTHS) + 2)
    model = load(policy)
    for request in requests:
        expected = greedy(model, request.prompt_ids, 24)
        for index in request.indices:
            assert got[request.request_id, index].token_ids == expected, request
    assert len({token for sample in got.values() for token in sample.token_ids}) > 20


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_equal_those_of_a_plain_forward(
    family, make_policy, make_sampler, draw, prompt
):
    policy = make_policy(family)
    requests = [
        Request(request_id=str(n), prompt_ids=prompt(n), num_shared=3 * (n > 3), indices=(0, 4))
        for n in LENGTHS
    ]
    settings = {"temperature": 0.8, "top_k": 20, "top_p": 0.95}
    params = SamplingParams(n=5, max_new_tokens=40, **settings)
    samples = draw(make_sampler(policy), requests, params)
    model = load(policy)
    for request in requests:
        for index in request.indices:
            sample = samples[request.request_id, index]
            exact = forward_logprobs(model, request.prompt_ids, sample.token_ids)
            tokens = torch.tensor(sample.token_ids)[:, None]
            assert torch.allclose(
                torch.tensor(sample.logprobs), exact.gather(1, tokens)[:, 0], atol=1e-4, rtol=0
            )
            scores = exact / settings["temperature"]
            scores[scores < scores.topk(20).values[:, -1:]] = float("-inf")
            ordered = scores.softmax(-1).sort(descending=True)
            cut = ordered.values.cumsum(-1) - ordered.values >= settings["top_p"]
            scores[cut.gather(1, ordered.indices.argsort())] = float("-inf")
            drawn_from = scores.log_softmax(-1).gather(1, tokens)[:, 0]
            assert torch.allclose(
                torch.tensor(sample.sampling_logprobs), drawn_from, atol=1e-4, rtol=0
            )


def test_bfloat16_probabilities_stay_close_to_those_of_float32(
    make_policy, make_sampler, draw, prompt
):
    policy = make_policy()
    request = Request(request_id="a", prompt_ids=prompt(20), indices=tuple(range(16)))
    params = SamplingParams(n=16, temperature=1.0, top_k=0, max_new_tokens=40)
    samples = draw(make_sampler(policy, dtype="bfloat16"), [request], params)
    model = load(policy)
    gaps = []
    for sample in samples.values():
        exact = forward_logprobs(model, request.prompt_ids, sample.token_ids)
        exact = exact.gather(1, torch.tensor(sample.token_ids)[:, None])[:, 0]
        gaps.append((torch.tensor(sample.logprobs).exp() - exact.exp()).abs())
    # The bound that verl gives for engine against trainer is 0.005 for trained models; random
    # ones with logits this large lose more to the rounding of weights alone.
    assert torch.cat(gaps).mean() < 0.02


def test_first_two_tokens_have_the_exact_distribution(make_policy, make_sampler, draw, prompt):
    policy, num = make_policy(), 6000
    request = Request(request_id="a", prompt_ids=prompt(11), indices=tuple(range(num)))
    params = SamplingParams(n=num, temperature=1.3, top_k=8, max_new_tokens=2)
    sampler = make_sampler(policy, max_batch_size=500, cache_tokens=8192)
    sampler.eos_ids = ()
    samples = draw(sampler, [request], params)
    model = load(policy)
    counts, exact = torch.zeros(64, 64), torch.zeros(64, 64, dtype=torch.float64)

    def probabilities(ids):
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0, -1].double() / 1.3
        scores[scores < scores.topk(8).values[-1]] = float("-inf")
        return scores.softmax(-1)

    first = probabilities(request.prompt_ids)
    for token in first.nonzero().flatten().tolist():
        exact[token] = first[token] * probabilities((*request.prompt_ids, token))
    for sample in samples.values():
        counts[sample.token_ids] += 1
    assert (counts[exact == 0] == 0).all()
    expected = exact * num
    common = expected >= 5
    cells = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    statistic = float(((cells - expected) ** 2 / expected.clamp_min(1e-9)).sum())
    degrees = len(cells) - 1
    assert degrees > 20
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5
