import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from restem_lightning.errors import UserError
from restem_lightning.m_step import check_policy_folder, export_policy, policy_hash
from restem_lightning.m_step.export import _check_logits

IDS = torch.tensor([[5, 9, 2, 33]])


@pytest.mark.parametrize(
    ("family", "tie"), [("llama", False), ("llama", True), ("gemma3_text", True)]
)
def test_exported_policy_gives_the_logits_of_the_trained_module(
    make_policy, make_accepted, fit, tmp_path, family, tie
):
    policy = make_policy(family, tie=tie)
    module, _, _ = fit(policy, make_accepted(), max_epochs=1)
    export_policy(module, tmp_path / "out", source_policy=policy)
    check_policy_folder(tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        trained = module.model.eval()(IDS).logits
        assert torch.equal(reloaded(IDS).logits, trained)
        assert not torch.equal(AutoModelForCausalLM.from_pretrained(policy)(IDS).logits, trained)
    assert not (tmp_path / "out.partial").exists()


def test_tokenizer_chat_template_and_eos_come_from_the_source_policy(make_policy, tmp_path):
    policy = make_policy()
    GenerationConfig(eos_token_id=[1, 7], temperature=0.5, do_sample=True).save_pretrained(policy)
    model = AutoModelForCausalLM.from_pretrained(policy)
    export_policy(model, tmp_path / "out", source_policy=policy)
    before, after = (AutoTokenizer.from_pretrained(p) for p in (policy, tmp_path / "out"))
    assert before.get_vocab() == after.get_vocab()
    assert before.chat_template == after.chat_template
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [1, 7]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.eos_token_id == 1


def test_export_replaces_a_half_written_folder(make_policy, tmp_path):
    policy, out = make_policy(), tmp_path / "out"
    for folder in (out, tmp_path / "out.partial"):
        folder.mkdir()
        (folder / "stale.safetensors").write_text("half")
    export_policy(AutoModelForCausalLM.from_pretrained(policy), out, source_policy=policy)
    assert not (out / "stale.safetensors").exists()
    assert policy_hash(out) == policy_hash(policy)


def test_export_refuses_a_folder_with_other_logits(make_policy):
    policy = make_policy()
    with torch.no_grad():
        probe = AutoModelForCausalLM.from_pretrained(policy)(torch.arange(8)[None]).logits
    _check_logits(policy, probe)
    with pytest.raises(RuntimeError, match="logits"):
        _check_logits(policy, probe + probe.flip(-1))


@pytest.mark.parametrize("tie", [False, True])
def test_a_policy_of_several_files_is_the_policy_of_one(make_policy, tmp_path, tie):
    policy = make_policy(tie=tie)
    model = AutoModelForCausalLM.from_pretrained(policy)
    export_policy(model, tmp_path / "out", source_policy=policy, file_bytes=10_000)
    sizes = [file.stat().st_size for file in (tmp_path / "out").glob("model-*.safetensors")]
    assert len(sizes) > 2
    assert max(sizes) < 12_000  # the header comes on top
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert reloaded.keys() == model.state_dict().keys()
    assert all(torch.equal(reloaded[name], value) for name, value in model.state_dict().items())
    assert policy_hash(tmp_path / "out") != policy_hash(policy)  # a hash of files


def test_policy_hash_depends_on_weights_config_and_tokenizer(make_policy):
    policy = make_policy()
    hashes = {policy_hash(policy)}
    assert hashes == {policy_hash(make_policy(name="same"))}
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        file = policy / name
        content = file.read_bytes()
        file.write_bytes(content + b" ")
        hashes.add(policy_hash(policy))
        file.write_bytes(content)
    assert len(hashes) == 4


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ("config.json", "config.json"),
        ("model.safetensors", "weights"),
        ("tokenizer.json", "tokenizer"),
    ],
)
def test_incomplete_policy_folder_is_refused(make_policy, remove, message):
    policy = make_policy()
    check_policy_folder(policy)
    (policy / remove).unlink()
    with pytest.raises(UserError, match=message):
        check_policy_folder(policy)


def test_a_damaged_policy_folder_is_refused(make_policy):
    policy = make_policy()
    weights, config = policy / "model.safetensors", policy / "config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"damaged model\.safetensors"):
        check_policy_folder(policy)
    weights.write_bytes(whole)
    config.write_text("{")
    with pytest.raises(UserError, match=r"config\.json must be JSON"):
        check_policy_folder(policy)


def test_a_policy_folder_that_lacks_one_of_its_files_is_refused(make_policy, tmp_path):
    policy, out = make_policy(), tmp_path / "out"
    model = AutoModelForCausalLM.from_pretrained(policy)
    export_policy(model, out, source_policy=policy, file_bytes=10_000)
    file = max(out.glob("model-*.safetensors"))
    file.unlink()
    with pytest.raises(UserError, match=f"lacks {file.name}"):
        check_policy_folder(out)


def test_policy_without_eos_or_folder_is_refused(make_policy, tmp_path):
    policy = make_policy()
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((policy / name).read_text())
        settings.pop("eos_token_id", None)
        (policy / name).write_text(json.dumps(settings))
    with pytest.raises(UserError, match="EOS"):
        check_policy_folder(policy)
    with pytest.raises(UserError, match="folder"):
        check_policy_folder(tmp_path / "nothing")
