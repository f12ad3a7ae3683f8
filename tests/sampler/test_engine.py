"""How completions end, what the engine refuses, and new weights."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from restem_lightning.errors import UserError
from restem_lightning.sampler import EngineParams, Request, Sampler, SamplingParams
from restem_lightning.sampler.fused import Projection
from restem_lightning.sampler.runner import useful_tokens
from restem_lightning.sampler.weights import load_module

VOCAB, EOS = 64, 1


def decode(token_ids):
    return "".join(f"{token:02d}." for token in token_ids)


@pytest.fixture
def request_of_many(prompt):
    return Request(request_id="a", prompt_ids=prompt(10), indices=tuple(range(40)))


def test_completions_end_at_eos_or_at_the_longest_length(
    request_of_many, make_policy, make_sampler, draw
):
    params = SamplingParams(n=40, temperature=1.5, top_k=0, max_new_tokens=30)
    samples = draw(make_sampler(make_policy()), [request_of_many], params)
    assert {sample.finish_reason for sample in samples.values()} == {"eos", "length"}
    for sample in samples.values():
        assert len(sample.token_ids) == len(sample.logprobs) == len(sample.sampling_logprobs)
        assert EOS not in sample.token_ids[:-1]
        assert (sample.token_ids[-1] == EOS) == (sample.finish_reason == "eos")
        assert sample.finish_reason == "eos" or len(sample.token_ids) == 30


def test_several_eos_ids_are_known_in_their_order(make_policy, make_sampler):
    sampler = make_sampler(make_policy())
    sampler.module.generation_config.eos_token_id = [EOS, 7, 9]
    assert Sampler(sampler.module, sampler.engine).eos_ids == (EOS, 7, 9)


def test_any_of_several_eos_ids_ends_a_completion(request_of_many, make_policy, make_sampler, draw):
    sampler = make_sampler(make_policy())
    sampler.eos_ids = tuple(range(32))
    params = SamplingParams(n=40, temperature=1.5, top_k=0, max_new_tokens=30)
    for sample in draw(sampler, [request_of_many], params).values():
        assert all(token >= 32 for token in sample.token_ids[:-1])
        assert (sample.token_ids[-1] < 32) == (sample.finish_reason == "eos")


def test_one_new_token(request_of_many, make_policy, make_sampler, draw):
    params = SamplingParams(n=40, max_new_tokens=1)
    samples = draw(make_sampler(make_policy()), [request_of_many], params)
    assert len(samples) == 40
    assert {len(sample.token_ids) for sample in samples.values()} == {1}


def test_completions_are_cut_before_a_stop_string_that_crosses_tokens(
    request_of_many, make_policy, make_sampler, draw
):
    sampler = make_sampler(make_policy())
    sampler.eos_ids = ()
    params = SamplingParams(n=40, temperature=1.0, top_k=0, max_new_tokens=30)
    free = draw(sampler, [request_of_many], params)
    text = decode(free["a", 0].token_ids)
    stop = (text[20:25], "never")  # from the end of one token to the middle of the one after next
    params = SamplingParams(n=40, temperature=1.0, top_k=0, max_new_tokens=30, stop=stop)
    stopped = draw(sampler, [request_of_many], params, decode=decode)
    assert stopped["a", 0].finish_reason == "stop"
    for address, sample in stopped.items():
        text = decode(free[address].token_ids)
        place = text.find(stop[0])
        assert sample.finish_reason == ("length" if place < 0 else "stop")
        # The stop string begins with the last character of a token, whose others are text.
        num_kept = 30 if place < 0 else place // 3 + 1
        assert sample.token_ids == free[address].token_ids[:num_kept]
        assert sample.logprobs == free[address].logprobs[:num_kept]
        assert sample.num_beyond == (1 if place >= 0 else 0)


def test_stop_strings_without_a_decoder_are_refused(
    request_of_many, make_policy, make_sampler, draw
):
    with pytest.raises(UserError, match=r"sampling\.stop needs text"):
        draw(make_sampler(make_policy()), [request_of_many], SamplingParams(stop=("x",)))


@pytest.mark.parametrize("shares", [True, False])
def test_preambles_that_nobody_needs_make_room_for_others(
    shares, make_policy, make_sampler, draw, prompt
):
    # Each request has a preamble of its own; together they are larger than the cache.
    sampler = make_sampler(make_policy(), max_batch_size=2, cache_tokens=8 * 12)
    requests = [
        Request(
            request_id=str(number),
            prompt_ids=(*prompt(30, seed=number * (not shares)), *prompt(5, seed=number)),
            num_shared=30,
        )
        for number in range(8)
    ]
    assert len(draw(sampler, requests, SamplingParams(n=1, max_new_tokens=12))) == 8


def test_a_prompt_beyond_the_context_of_the_model_is_refused(
    make_policy, make_sampler, draw, prompt
):
    sampler = make_sampler(make_policy())
    request = Request(request_id="long", prompt_ids=prompt(250))
    message = (
        r"sampling\.max_new_tokens \(7\) and the 250 prompt tokens of long are 257 tokens, more "
        r"than the 256 that this model takes; lower it to 6"
    )
    with pytest.raises(UserError, match=message):
        draw(sampler, [request], SamplingParams(n=1, max_new_tokens=7))
    assert len(draw(sampler, [request], SamplingParams(n=1, max_new_tokens=6))) == 1
    request = Request(request_id="longer", prompt_ids=prompt(256))
    with pytest.raises(UserError, match="this model takes; leave the problem out"):
        draw(sampler, [request], SamplingParams(n=1, max_new_tokens=7))


def test_requests_are_read_as_late_as_possible(make_policy, make_sampler, prompt):
    sampler = make_sampler(make_policy(), max_batch_size=8)
    sampler.eos_ids = ()
    num_read = 0

    def endless():
        nonlocal num_read
        while True:
            num_read += 1
            yield Request(request_id=str(num_read), prompt_ids=prompt(9), indices=(0, 1, 2, 3))

    params = SamplingParams(n=4, temperature=1.0, max_new_tokens=5)
    samples = sampler.generate(endless(), params, seed=0, iteration=0)
    for _ in range(16):
        next(samples)
    assert num_read <= 4 + 4  # those that gave 16 completions, and at most as many waiting


SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "vocab_size": VOCAB,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": EOS,
    "pad_token_id": 0,
}
UNSUPPORTED = {
    "bloom": ({}, "bloom"),
    "falcon": ({}, "falcon"),
    "mamba": ({"state_size": 4}, "mamba"),
    "llama4_text": (
        {"num_local_experts": 2, "head_dim": 8, "intermediate_size_mlp": 32, "moe_layers": []},
        "llama4_text.*chunked",
    ),
    "nemotron": ({}, "NemotronAttention"),
    "llama": (
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
        "llama.*rotations depend on the length",
    ),
    "gpt_oss": ({"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8}, "GptOss.*sinks"),
    "deepseek_v2": (
        {"kv_lora_rank": 8, "q_lora_rank": None, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8},
        "DeepseekV2Attention.*config says",
    ),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, "lfm2.*1 of its 2 layers"),
}


@pytest.mark.parametrize("family", UNSUPPORTED)
def test_models_that_would_be_sampled_wrongly_are_refused_by_name(family, tmp_path, prompt):
    settings, message = UNSUPPORTED[family]
    config = AutoConfig.for_model(family, **(SMALL | settings))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    engine = EngineParams(device="cpu", max_batch_size=4, block_size=8, cache_tokens=512)
    with pytest.raises(UserError, match=f"does not support {message}"):
        list(
            Sampler(tmp_path, engine).generate(
                [Request(request_id="a", prompt_ids=prompt(5))],
                SamplingParams(n=1, max_new_tokens=2),
                seed=0,
                iteration=0,
            )
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_joined_and_packed_projections_equal_the_layers_they_join(dtype, make_policy):
    module = load_module(make_policy("qwen2"), device=torch.device("cpu"), dtype=dtype)
    attention = module.model.layers[1].self_attn
    layers = (attention.q_proj, attention.k_proj, attention.v_proj)
    for layer in layers:
        torch.nn.init.normal_(layer.bias)
    inputs = torch.randn(16, 32, dtype=dtype)
    apart = torch.cat([layer(inputs) for layer in layers], -1)
    joined = Projection(*layers)
    assert torch.equal(torch.cat([layer(inputs) for layer in layers], -1), apart)
    joined.pack()
    error = (joined(inputs) - apart).abs().max()
    assert error <= 2 * torch.finfo(dtype).eps * apart.abs().max()


def test_new_weights_in_the_module_reach_the_joined_ones(make_policy):
    module = load_module(make_policy(), device=torch.device("cpu"), dtype=torch.float32)
    mlp = module.model.layers[0].mlp
    joined = Projection(mlp.gate_proj, mlp.up_proj)
    with torch.no_grad():
        mlp.up_proj.weight.fill_(3.0)
    assert (joined.weight[48:] == 3).all()
    assert not (joined.weight[:48] == 3).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tie", [False, True])
def test_new_weights_in_place_equal_a_fresh_sampler(
    dtype, tie, make_policy, make_sampler, draw, request_of_many
):
    old, new = (make_policy(seed=seed, tie_word_embeddings=tie) for seed in (1, 2))
    sampler, fresh = make_sampler(old, dtype=dtype), make_sampler(new, dtype=dtype)
    params = SamplingParams(n=40, max_new_tokens=20)
    before = draw(sampler, [request_of_many], params)
    places = [parameter.data_ptr() for parameter in sampler.module.parameters()]
    assert sampler.checksum() != fresh.checksum()
    live = AutoModelForCausalLM.from_pretrained(new, dtype=torch.float32)
    sampler.update_weights(live.state_dict().items())
    assert sampler.checksum() == fresh.checksum()
    assert [parameter.data_ptr() for parameter in sampler.module.parameters()] == places
    after = draw(sampler, [request_of_many], params)
    assert after == draw(fresh, [request_of_many], params)
    assert after != before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda named: named.pop("model.norm.weight"), r"no new weights for model\.norm\.weight"),
        (lambda named: named.update(other=torch.zeros(1)), "no parameter other"),
        (
            lambda named: named.update({"model.norm.weight": torch.zeros(3)}),
            r"model\.norm\.weight: shape \(3,\), not \(32,\)",
        ),
    ],
)
def test_missing_unknown_and_misshapen_weights_are_refused(
    change, message, make_policy, make_sampler
):
    sampler = make_sampler(make_policy())
    named = dict(sampler.module.named_parameters())
    change(named)
    with pytest.raises(ValueError, match=message):
        sampler.update_weights(named.items())


def test_a_policy_that_lacks_weights_is_refused(make_policy, tmp_path):
    policy = shutil.copytree(make_policy(), tmp_path / "policy")
    weights = load_file(policy / "model.safetensors")
    lacking = [name for name in weights if "layers.1.mlp" in name]
    rest = {name: weight for name, weight in weights.items() if name not in lacking}
    save_file(rest, policy / "model.safetensors", metadata={"format": "pt"})
    message = rf"lacks {min(lacking)} and {len(lacking) - 1} more"
    with pytest.raises(UserError, match=message):
        load_module(policy, device=torch.device("cpu"), dtype=torch.float32)


def test_a_changed_weight_changes_the_checksum_and_order_does_not(make_policy, make_sampler):
    sampler = make_sampler(make_policy())
    before = sampler.checksum()
    assert make_sampler(make_policy()).checksum() == before
    with torch.no_grad():
        sampler.module.model.norm.weight[3] += 1e-6
    assert sampler.checksum() != before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "float16"}, r"engine\.dtype \(float16\) must be one of auto, float32, bfloat16"),
        ({"batch_invariant": "yes"}, r"engine\.batch_invariant \(yes\)"),
        ({"max_batch_size": -1}, r"engine\.max_batch_size \(-1\) must be from 0"),
        ({"cache_tokens": -1}, r"engine\.cache_tokens \(-1\) must be from 0"),
        ({"threads": 1_000_000}, r"engine\.threads \(1000000\) must be from 0 to 1024"),
        ({"kernels": "cuda"}, r"engine\.kernels \(cuda\) must be one of auto, c, torch, triton"),
        ({"block_size": 0}, r"engine\.block_size \(0\) must be from 1"),
        (
            {"device": "cpu", "kernels": "triton", "block_size": 12},
            r"engine\.block_size \(12\) must be 8, 16, 32",
        ),
    ],
)
def test_engine_settings_are_checked(settings, message, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UserError, match=message):
        EngineParams(**settings)


def test_a_cache_on_a_gpu_is_no_larger_than_can_be_in_use(make_policy, make_sampler):
    module = make_sampler(make_policy()).module  # 3 layers x 2 key heads x 8 values of 32 bits
    sizes = {"num_lanes": 512, "context": 256}
    assert useful_tokens(module, 384 * 1000 + 383, **sizes) == 1000
    assert useful_tokens(module, 120 * 10**9, **sizes) == 4 * 512 * 256
