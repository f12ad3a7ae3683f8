import json
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from restem_lightning.errors import UserError
from restem_lightning.m_step import LoraParams, export_policy, load_best, stop_callbacks
from restem_lightning.m_step.export import policy_hash
from restem_lightning.m_step.fsdp import shard_policy
from restem_lightning.m_step.weights import empty_policy, load_policy, read_weights
from tests.launch import run_ranks

WORKER = Path(__file__).with_name("fsdp_worker.py")
# A large eps, or Adam would hide a wrong scale of the gradients.
MODULE = {"learning_rate": 1e-2, "gradient_clip_norm": 0.5, "schedule": "linear", "eps": 0.01}
DATA = {"batch_size": 8, "tokens_per_micro_batch": 24}
LORA = {"r": 4, "alpha": 16}


class BestAtFour(pl.Callback):
    def __init__(self):
        self.norms = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.norms.append(trainer.callback_metrics["gradient_norm"].item())

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("val_reward", float(trainer.global_step == 4))


def run_cases(num_ranks, cases):
    done = run_ranks(num_ranks, WORKER, json.dumps(cases), timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def parameters(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.fixture
def train_alone(make_accepted, fit, tmp_path):
    """Trains as one process without FSDP; returns (losses, norms), exports best and final."""

    def train(name, policy, accepted, module):
        watch, callbacks = BestAtFour(), stop_callbacks("best", folder=tmp_path / name)
        fitted, losses, _ = fit(
            policy,
            accepted,
            module=module,
            data=DATA,
            callbacks=[watch, *callbacks],
            val_check_interval=2,
            check_val_every_n_epoch=None,
        )
        export_policy(fitted, tmp_path / name / "final", source_policy=policy)
        load_best(fitted, callbacks[0].best_model_path)
        export_policy(fitted, tmp_path / name / "best", source_policy=policy)
        assert min(watch.norms) > MODULE["gradient_clip_norm"]  # clipping is at work
        return losses, watch.norms

    return train


def prepare(cases, policies, accepted, folder):
    for name, case in cases.items():
        case |= {"accepted": str(accepted), "data": DATA, "folder": str(folder / name)}
        case |= {"module": MODULE | case.get("module", {}), "policy": str(policies[case["like"]])}
        (folder / name).mkdir()


def check_like_one(name, case, alone, folder):
    """Compares a case with training as one process: losses, norms and both exports."""
    losses, norms = alone[case["like"]]
    result = json.loads((folder / name / "result.json").read_text())
    assert result["steps"] == 6
    seen, rtol = len(result["losses"]), case.get("rtol", 1e-5)  # fewer after a kill
    assert seen == (2 if "die_at" in case else 6)
    np.testing.assert_allclose(result["losses"], losses[-seen:], rtol, err_msg=name)
    np.testing.assert_allclose(result["norms"], norms[-seen:], 5 * rtol, err_msg=name)
    for which in ("best", "final"):
        assert AutoConfig.from_pretrained(folder / name / which).dtype == torch.float32
    if "precision" in case:  # rounding moves small gradients of single weights by their size
        return
    for which in ("best", "final"):
        one = parameters(folder / f"one_{case['like']}" / which)
        many = parameters(folder / name / which)
        assert many.keys() == one.keys()
        for key, value in one.items():
            torch.testing.assert_close(
                many[key], value, rtol=10 * rtol, atol=rtol, msg=f"{name} {key}"
            )


def check_all_gathers(folder):
    """Two decoder layers and the rest are gathered as often as reshard_after_forward says."""
    for name in ("fsdp", "fsdp_whole"):
        result = json.loads((folder / name / "result.json").read_text())
        numbers = result["num_micro_batches"][1:]  # the check before the first step gathers too
        assert max(numbers) > 1
        expected = [5 * number for number in numbers]  # a layer for each pass, the rest for both
        expected = expected if name == "fsdp" else [3] * len(numbers)
        assert result["all_gathers"][1:] == expected, name


def test_ranks_train_resume_and_export_like_one(make_policy, make_accepted, train_alone, tmp_path):
    accepted = make_accepted(size=22)  # the last optimizer step of an epoch is smaller
    policies = {"plain": make_policy(), "tied": make_policy(name="tied", tie=True)}
    for family in ("qwen2", "qwen3", "gemma3_text"):  # biases; norms of heads; those and windows
        policies[family] = make_policy(family, name=family, tie=family == "gemma3_text")
    policies["lora"] = policies["qwen2"]
    fsdp, one_file = ({"strategy": name} for name in ("fsdp", "fsdp_one_file"))
    split, unsplit = {"tensor_parallel_size": 2}, {"tensor_parallel_size": 1}
    whole = {"reshard_after_forward": False}
    bf16 = {"precision": "bf16-mixed", "rtol": 0.03}
    again = {"activation_checkpointing": True}
    two = {
        "fsdp": fsdp | {"like": "plain", "counts": True},
        "fsdp_one_file": one_file | {"like": "tied"},
        "fsdp_killed": fsdp | {"like": "plain", "die_at": 5},
        "fsdp_whole": fsdp | {"like": "tied", "module": whole, "counts": True},
        "ddp": {"strategy": "ddp", "like": "plain"},
        "bf16": fsdp | bf16 | {"like": "plain"},
        "fsdp_lora": fsdp | {"like": "lora", "module": {"lora": LORA}},
        "split_tied": fsdp | split | {"like": "tied"},
        "split_bf16": fsdp | split | bf16 | {"like": "plain", "module": again},
        "split_lora": fsdp | split | {"like": "lora", "module": {"lora": LORA}},
        "split_to_fsdp": fsdp | split | {"like": "plain", "die_at": 5, "then": unsplit},
        "fsdp_to_split": fsdp | {"like": "plain", "die_at": 5, "then": split},
    }
    four = {
        "four": fsdp | {"like": "tied", "module": again},
        "four_split": one_file | split | {"like": "qwen2", "module": again},
        "four_split_whole": fsdp | split | {"like": "gemma3_text", "module": whole},
    }
    two_to_four = {
        "grown": fsdp | {"like": "plain", "die_at": 5},
        "grown_split": fsdp | split | {"like": "qwen3", "die_at": 5},
    }
    cases = two | four | two_to_four
    prepare(cases, policies, accepted, tmp_path)
    dies, goes_on = {"stays_dead": True}, {"die_at": None}
    run_cases(2, two | {name: case | dies for name, case in two_to_four.items()})
    run_cases(4, four | {name: case | goes_on for name, case in two_to_four.items()})

    extra = {"lora": {"lora": LoraParams(**LORA)}}
    alone = {
        like: train_alone(f"one_{like}", policy, accepted, MODULE | extra.get(like, {}))
        for like, policy in policies.items()
    }
    for name, case in cases.items():
        check_like_one(name, case, alone, tmp_path)
    check_all_gathers(tmp_path)
    assert not list((tmp_path / "fsdp_one_file" / "m_step").glob("*/*"))
    assert policy_hash(tmp_path / "fsdp" / "best") != policy_hash(tmp_path / "fsdp" / "final")
    for which in ("best", "final"):
        killed, unhurt = (tmp_path / name / which for name in ("fsdp_killed", "fsdp"))
        assert policy_hash(killed) == policy_hash(unhurt)


def test_no_rank_holds_the_whole_model_while_it_loads(tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=16000,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "policy", max_shard_size="100MB")
    result = tmp_path / "loading.json"
    run_cases(4, {"loading": {"policy": str(tmp_path / "policy"), "result": str(result)}})
    loaded = json.loads(result.read_text())
    norms = {name: each.norm().item() for name, each in model.named_parameters()}
    assert loaded["norms"] == pytest.approx(norms, rel=1e-6)
    for rank in loaded["ranks"]:
        assert rank["whole_bytes"] > 200e6
        assert rank["local_bytes"] == pytest.approx(rank["whole_bytes"] / 4, rel=0.01)
        # A quarter, and what the code itself takes.
        assert rank["peak_bytes"] < 0.5 * rank["whole_bytes"]


@pytest.mark.slow
def test_two_ranks_with_compiled_and_recomputed_layers_train_like_one(
    make_policy, make_accepted, train_alone, tmp_path
):
    accepted, policies = make_accepted(size=22), {"plain": make_policy()}
    cases = {
        "compiled": {
            "strategy": "fsdp",
            "like": "plain",
            "module": {"compile": True, "activation_checkpointing": True},
        }
    }
    prepare(cases, policies, accepted, tmp_path)
    run_cases(2, cases)
    alone = {"plain": train_alone("one_plain", policies["plain"], accepted, MODULE)}
    check_like_one("compiled", cases["compiled"], alone, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gemma2", "gemma3_text"])
def test_an_empty_policy_with_its_weights_read_is_the_loaded_policy(make_policy, family, dtype):
    policy = str(make_policy(family, tie=family.startswith("gemma")))
    model = empty_policy(policy, dtype)
    assert {each.device.type for each in model.parameters()} == {"meta"}
    read_weights(model, policy, torch.device("cpu"))
    loaded = load_policy(policy, dtype)
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = (dict(getattr(one, kind)()) for one in (model, loaded))
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=0, atol=0, msg=name)
    ids = torch.arange(12)[None]
    assert torch.equal(model(input_ids=ids).logits, loaded(input_ids=ids).logits)


def test_a_folder_that_lacks_a_weight_is_refused_by_its_name(make_policy):
    policy = make_policy()
    config = AutoConfig.from_pretrained(policy)
    config.num_hidden_layers = 3
    config.save_pretrained(policy)
    with pytest.raises(UserError, match=r"no weight model\.layers\.2"):
        read_weights(empty_policy(str(policy), torch.float32), str(policy), torch.device("cpu"))


def test_sharding_refuses_a_model_without_known_layers():
    class Unknown(torch.nn.Linear):
        _no_split_modules = None

    with pytest.raises(UserError, match="Unknown"):
        shard_policy(Unknown(2, 2), mesh=None)
