import json
import re
import runpy
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from restem_lightning.errors import UserError
from restem_lightning.m_step.tensor_parallel import check_split, split_plan
from tests.launch import run_ranks

WORKER = Path(__file__).with_name("split_worker.py")

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 50,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


def empty(family, **changes):
    with torch.device("meta"):
        config = AutoConfig.for_model(family, **(SIZES | changes))
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text"])
def test_each_linear_layer_of_a_decoder_is_split_and_nothing_else_is(family):
    model = empty(family)
    plan = split_plan(model, 2)
    linear = {name for name, each in model.named_modules() if isinstance(each, torch.nn.Linear)}
    split = {name for name, style in plan.items() if style in ("colwise", "rowwise")}
    assert split == linear - {"lm_head"}
    norms = {name for name in plan if name not in split}
    assert all(re.fullmatch(r".*self_attn\.[qk]_norm", name) for name in norms)
    assert len(norms) == (4 if family in ("qwen3", "gemma3_text") else 0)


def test_heads_that_do_not_split_are_refused_with_their_number():
    with pytest.raises(UserError, match=r"\(3\) must divide .* num_key_value_heads \(2\)"):
        split_plan(empty("llama"), 3)


def test_a_width_that_does_not_split_is_refused_by_its_name():
    with pytest.raises(UserError, match=r"\(2\) must divide out_features \(51\) of .*gate_proj"):
        split_plan(empty("llama", intermediate_size=51), 2)


def test_a_family_without_a_plan_is_refused_by_its_name():
    with pytest.raises(UserError, match=r"must be 1 for GPT2LMHeadModel: .* no plan"):
        split_plan(empty("gpt2"), 2)


def test_a_plan_with_an_unknown_style_is_refused_by_it():
    experts = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    with pytest.raises(UserError, match=r"must be 1 for Qwen3MoeForCausalLM: .* not supported"):
        split_plan(empty("qwen3_moe", **experts), 2)


def test_a_plan_that_leaves_out_what_sees_split_heads_is_refused():
    model = empty("qwen3")
    del model.tp_plan["model.layers.*.self_attn.k_norm"]
    with pytest.raises(UserError, match=r"nothing of model\.layers\.0\.self_attn\.k_norm"):
        split_plan(model, 2)


def test_a_folder_that_cannot_be_split_is_refused_without_its_weights(make_policy):
    policy = make_policy()
    (policy / "model.safetensors").unlink()
    check_split(str(policy), 2)
    with pytest.raises(UserError, match=r"\(4\) must divide .* num_key_value_heads \(2\)"):
        check_split(str(policy), 4)


@pytest.fixture
def varied(make_policy):
    """Makes a policy none of whose parameters are alike: no bias 0, no norm 1."""

    def make(family):
        folder = make_policy(family, name=family, tie=family.startswith(("gemma", "cohere")))
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn(parameter.shape), alpha=0.2)
        model.save_pretrained(folder)
        return str(folder)

    return make


def test_two_ranks_get_the_gradients_and_the_verifier_of_one(varied, tmp_path):
    # Beside those that test_fsdp.py trains: windows, caps, fused projections that are split after
    # their product, biases of the second half, norms over all heads, a parallel residual.
    names = ("mistral", "gemma2", "phi", "phi3", "glm", "olmo2", "starcoder2", "cohere2")
    job = {
        "result": str(tmp_path / "result.json"),
        "families": {name: varied(name) for name in names},
        "verifier": varied("llama"),
    }
    done = run_ranks(2, WORKER, json.dumps(job), timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result["families"]) == set(names)
    for name, errors in result["families"].items():
        worst = max(errors, key=errors.get)
        assert errors[worst] < 1e-5, (name, worst)
    alone = runpy.run_path(str(WORKER))["learn"](job["verifier"], None, tmp_path)
    for learned in result["learned"].values():
        assert learned["losses"] == pytest.approx(alone["losses"], rel=1e-4)
        assert learned["reference"] == pytest.approx(alone["reference"], rel=1e-5)
        assert learned["norms"] == pytest.approx(alone["norms"], rel=1e-4)
