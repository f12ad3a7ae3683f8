import json
import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from restem_lightning.errors import UserError
from restem_lightning.m_step import export_policy, load_best, policy_hash, stop_callbacks
from restem_lightning.m_step.fsdp import shard_policy

WORKER = Path(__file__).with_name("fsdp_worker.py")
# A large eps, or Adam would hide a wrong scale of the gradients.
MODULE = {"learning_rate": 1e-2, "gradient_clip_norm": 0.5, "schedule": "linear", "eps": 0.01}
DATA = {"batch_size": 8, "tokens_per_micro_batch": 24}


class BestAtFour(pl.Callback):
    def __init__(self):
        self.norms = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.norms.append(trainer.callback_metrics["gradient_norm"].item())

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("val_reward", float(trainer.global_step == 4))


def run_two_ranks(cases):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(WORKER)]
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *command, json.dumps(cases)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def parameters(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_two_ranks_train_and_export_like_one(make_policy, make_accepted, fit, tmp_path):
    policies = {"plain": make_policy(), "tied": make_policy(name="tied", tie=True)}
    accepted = make_accepted(size=22)  # the last optimizer step of an epoch is smaller
    common = {"accepted": str(accepted), "module": MODULE, "data": DATA}
    cases = {
        "fsdp": {"strategy": "fsdp", "policy": "plain"},
        "fsdp_one_file": {"strategy": "fsdp_one_file", "policy": "tied"},
        "fsdp_killed": {"strategy": "fsdp", "policy": "plain", "die_at": 5},
        "ddp": {"strategy": "ddp", "policy": "plain"},
        "bf16": {"strategy": "fsdp", "policy": "plain", "precision": "bf16-mixed", "rtol": 0.03},
    }
    for name, case in cases.items():
        case |= common | {"folder": str(tmp_path / name), "policy": str(policies[case["policy"]])}
        (tmp_path / name).mkdir()
    run_two_ranks(cases)

    for name, policy in policies.items():
        watch, callbacks = BestAtFour(), stop_callbacks("best", folder=tmp_path / f"one_{name}")
        module, losses, _ = fit(
            policy,
            accepted,
            module=MODULE,
            data=DATA,
            callbacks=[watch, *callbacks],
            val_check_interval=2,
            check_val_every_n_epoch=None,
        )
        export_policy(module, tmp_path / f"one_{name}" / "final", source_policy=policy)
        load_best(module, callbacks[0].best_model_path)
        export_policy(module, tmp_path / f"one_{name}" / "best", source_policy=policy)
        assert min(watch.norms) > MODULE["gradient_clip_norm"]  # clipping is at work
        for case in [c for c in cases if cases[c]["policy"] == str(policy)]:
            result = json.loads((tmp_path / case / "result.json").read_text())
            assert result["steps"] == 6
            seen, rtol = len(result["losses"]), cases[case].get("rtol", 1e-5)  # fewer after a kill
            np.testing.assert_allclose(result["losses"], losses[-seen:], rtol, err_msg=case)
            np.testing.assert_allclose(result["norms"], watch.norms[-seen:], 5 * rtol, err_msg=case)
            for which in ("best", "final"):
                one = parameters(tmp_path / f"one_{name}" / which)
                two = parameters(tmp_path / case / which)
                for key, value in one.items():
                    torch.testing.assert_close(
                        two[key], value, rtol=10 * rtol, atol=rtol, msg=f"{case} {key}"
                    )
    assert not list((tmp_path / "fsdp_one_file" / "m_step").glob("*/*"))
    assert policy_hash(tmp_path / "fsdp" / "best") != policy_hash(tmp_path / "fsdp" / "final")
    for which in ("best", "final"):
        killed, whole = (tmp_path / name / which for name in ("fsdp_killed", "fsdp"))
        assert policy_hash(killed) == policy_hash(whole)


def test_sharding_refuses_a_model_without_known_layers():
    class Unknown(torch.nn.Linear):
        _no_split_modules = None

    with pytest.raises(UserError, match="Unknown"):
        shard_policy(Unknown(2, 2), mesh=None)
