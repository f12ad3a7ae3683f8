import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from restem_lightning.errors import UserError
from restem_lightning.m_step import LoraParams, export_policy
from restem_lightning.m_step.lora import add_adapters, start_adapters
from restem_lightning.m_step.weights import load_policy, policy_weights

IDS = torch.arange(2, 12)[None]


def adapted(policy, seed=0, **settings):
    model = load_policy(str(policy))
    add_adapters(model, LoraParams(seed=seed, **settings))
    start_adapters(model, seed)
    return model


def test_a_fresh_adapter_is_the_policy_it_stands_on(make_policy):
    policy = make_policy()
    expected = load_policy(str(policy))(input_ids=IDS).logits
    assert torch.equal(adapted(policy)(input_ids=IDS).logits, expected)


def test_first_values_depend_on_the_seed_alone(make_policy):
    policy = make_policy()

    def values(seed):
        torch.manual_seed(len(str(torch.rand(1))))
        named = adapted(policy, seed=seed).named_parameters()
        return {name: each.detach() for name, each in named if "lora_A" in name}

    first, again, other = values(3), values(3), values(4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("tie", [False, True])
def test_only_adapters_learn_and_the_export_is_a_plain_merged_folder(
    make_policy, make_accepted, fit, tmp_path, tie
):
    policy = make_policy(tie=tie)
    module, losses, trainer = fit(policy, make_accepted(), module={"lora": LoraParams(r=4)})
    assert losses[-1] < losses[0]
    learned = {name for name, each in module.named_parameters() if each.requires_grad}
    assert all(".lora_" in name for name in learned)
    assert len(learned) == 2 * 2 * 7  # A and B of each linear layer of two decoder layers
    num_learned = sum(len(group["params"]) for group in trainer.optimizers[0].param_groups)
    assert num_learned == len(learned)
    base = AutoModelForCausalLM.from_pretrained(policy)
    for name, value in base.named_parameters():
        stored = dict(module.model.named_parameters())
        kept = stored.get(name, stored.get(name.replace(".weight", ".base_layer.weight")))
        assert torch.equal(kept, value)

    export_policy(module, tmp_path / "out", source_policy=policy)
    assert not list((tmp_path / "out").glob("adapter*"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.state_dict().keys() == base.state_dict().keys()
    with torch.no_grad():
        trained = module.model.eval()(input_ids=IDS).logits
        torch.testing.assert_close(merged(IDS).logits, trained, rtol=1e-5, atol=1e-5)
        assert (base(IDS).logits - trained).abs().max() > 1e-2


def test_the_sampler_gets_merged_weights_by_the_policys_own_names(make_policy):
    model = adapted(make_policy(), r=2)
    with torch.no_grad():
        for name, each in model.named_parameters():
            if "lora_B" in name:
                each.normal_(std=0.1)
    plain = load_policy(str(make_policy(name="other")))
    plain.load_state_dict(dict(policy_weights(model)))
    expected = model(input_ids=IDS).logits
    torch.testing.assert_close(plain(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)


def test_mistakes_are_refused(make_policy, monkeypatch):
    policy = make_policy()
    with pytest.raises(UserError, match=r"lora\.r \(0\)"):
        adapted(policy, r=0)
    with pytest.raises(UserError, match=r"lora.target_modules.*nothing"):
        adapted(policy, target_modules=["nothing"])
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"restem-lightning\[lora\]"):
        adapted(policy)
