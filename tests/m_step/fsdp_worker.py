"""One rank of test_fsdp.py: trains, keeps the best weights, exports; writes the losses.

Usage: torchrun ... fsdp_worker.py '{"case": {"strategy", "policy", "accepted", "folder", ...}}'
"""

import contextlib
import json
import os
import sys
import threading
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from restem_lightning.m_step import (
    AcceptedDataModule,
    LoraParams,
    PolicyModule,
    export_policy,
    load_best,
    resume_checkpoint,
    stop_callbacks,
)
from restem_lightning.m_step.fsdp import shard_policy
from restem_lightning.m_step.shards import local
from restem_lightning.m_step.weights import empty_policy, policy_weights, read_weights

NUM_RANKS = int(os.environ["WORLD_SIZE"])


class AllGathers(TorchDispatchMode):
    """Counts them."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += operation is torch.ops.c10d._allgather_base_.default
        return operation(*args, **(kwargs or {}))


class Watch(pl.Callback):
    """Keeps losses and gives the best reward to optimizer step 4; may die at a given step.

    May count the all-gathers of weights and the micro-batches of each optimizer step too.
    """

    def __init__(self, die_at, counts):
        self.losses, self.norms, self.die_at = [], [], die_at
        self.counts, self.all_gathers, self.num_micro_batches = counts, [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.num_micro_batches.append(len(batch.micro_batches))
        self.collectives = AllGathers() if self.counts else contextlib.nullcontext()
        self.collectives.__enter__()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.collectives.__exit__(None, None, None)
        if self.counts:
            self.all_gathers.append(self.collectives.count)
        self.losses.append(trainer.callback_metrics["train_loss"].item())
        self.norms.append(trainer.callback_metrics["gradient_norm"].item())
        if trainer.global_step == self.die_at:
            raise InterruptedError

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("val_reward", float(trainer.global_step == 4))


def strategy(name, tensor_parallel_size=1):
    if name == "ddp":
        return DDPStrategy()
    return ModelParallelStrategy(
        data_parallel_size=NUM_RANKS // tensor_parallel_size,
        tensor_parallel_size=tensor_parallel_size,
        save_distributed_checkpoint=name == "fsdp",
    )


def run(case, die_at=None):
    folder = Path(case["folder"])
    watch = Watch(die_at, case.get("counts", False))
    callbacks = stop_callbacks("best", folder=folder / "m_step")
    settings = dict(case["module"])
    if "lora" in settings:
        settings["lora"] = LoraParams(**settings["lora"])
    module = PolicyModule(case["policy"], **settings)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=NUM_RANKS,
        strategy=strategy(case["strategy"], case.get("tensor_parallel_size", 1)),
        callbacks=[watch, *callbacks],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        max_epochs=2,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        precision=case.get("precision", "32-true"),
    )
    data = AcceptedDataModule(case["accepted"], **case["data"])
    trainer.fit(module, data, ckpt_path=resume_checkpoint(folder / "m_step"))
    export_policy(module, folder / "final", source_policy=case["policy"])
    (best,) = (c for c in callbacks if isinstance(c, ModelCheckpoint) and c.monitor)
    load_best(module, best.best_model_path)
    export_policy(module, folder / "best", source_policy=case["policy"])
    if trainer.is_global_zero:
        kept = ("losses", "norms", "all_gathers", "num_micro_batches")
        result = {name: getattr(watch, name) for name in kept} | {"steps": trainer.global_step}
        (folder / "result.json").write_text(json.dumps(result))


class PeakMemory(threading.Thread):
    """Watches the memory that is this process's own (pages of mapped files are not)."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self.done = self.now(), threading.Event()
        self.before = self.peak

    @staticmethod
    def now():
        lines = Path("/proc/self/status").read_text().splitlines()
        (line,) = (line for line in lines if line.startswith("RssAnon"))
        return 1024 * int(line.split()[1])

    def run(self):
        while not self.done.wait(0.002):
            self.peak = max(self.peak, self.now())

    def stop(self):
        self.done.set()
        self.join()
        return max(self.peak, self.now()) - self.before


def measure_loading(policy, result):
    """Writes what loading a policy in shards took on each rank, and what whole weights are."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (NUM_RANKS,))
    memory = PeakMemory()
    memory.start()
    model = empty_policy(policy, torch.float32)
    shard_policy(model, mesh)
    read_weights(model, policy, torch.device("cpu"))
    seen = {
        "peak_bytes": memory.stop(),
        "local_bytes": sum(4 * local(each).numel() for each in model.parameters()),
        "whole_bytes": sum(4 * each.numel() for each in model.parameters()),
    }
    gathered = [None] * NUM_RANKS
    dist.all_gather_object(gathered, seen)
    weights = {name: each.norm().item() for name, each in policy_weights(model)}
    if dist.get_rank() == 0:
        Path(result).write_text(json.dumps({"ranks": gathered, "norms": weights}))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    cases = json.loads(sys.argv[1])
    if loading := cases.pop("loading", None):
        measure_loading(**loading)
    for each in cases.values():
        if each.get("die_at"):
            with contextlib.suppress(InterruptedError):
                run(each, each["die_at"])
        if not each.get("stays_dead"):
            run(each | each.get("then", {}))
