"""One of two ranks of test_tensor_parallel.py; rank 0 writes what came out.

Usage: torchrun ... split_worker.py '{"result", "families": {name: policy}, "verifier": policy}'
"""

import json
import sys
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import init_device_mesh

from restem_lightning.m_step.packing import TrainingSequence, pack_step
from restem_lightning.m_step.placement import place_policy
from restem_lightning.m_step.preference import PairSet, PreferenceModule, pair_loader
from restem_lightning.m_step.shards import whole
from restem_lightning.m_step.tensor_parallel import average_copies
from restem_lightning.m_step.weights import empty_policy, load_policy, policy_weights

CPU = torch.device("cpu")


def gradient_errors(policy, mesh):
    """Error of the loss and of each gradient of a split policy, of its size in the whole one."""
    draw = np.random.default_rng(0)
    ids = [draw.integers(2, 60, length).astype(np.int32) for length in (9, 12, 15)]
    sequences = [TrainingSequence(each, 4, 1.0) for each in ids]
    (batch,) = pack_step(sequences, tokens_per_micro_batch=99).micro_batches
    factors = torch.linspace(0.5, 1.5, len(batch.target_ids))
    one, split = load_policy(policy), empty_policy(policy, torch.float32)
    place_policy(split, policy, mesh, CPU)
    expected = one.weighted_loss(batch, factors)
    expected.backward()
    loss = split.weighted_loss(batch, factors, mesh["tensor_parallel"])
    loss.backward()
    average_copies(list(split.parameters()), mesh["tensor_parallel"])
    dist.all_reduce(loss.detach())
    gradients = {name: each.grad for name, each in one.named_parameters()}
    errors = {
        name: ((whole(each.grad) - gradients[name]).norm() / gradients[name].norm()).item()
        for name, each in split.named_parameters()
    }
    return errors | {"loss": abs(loss.item() / mesh.size() / expected.item() - 1)}


def learn(policy, sizes, folder):
    """Trains a verifier; returns its losses and a norm of each weight."""
    prompts, draw = [(5, 9, 3), (4, 6), (8,)], np.random.default_rng(0)
    sequences = [
        TrainingSequence(np.array([*prompt, *draw.integers(2, 60, 4)], np.int32), len(prompt), 1.0)
        for prompt in prompts * 3
        for _ in range(2)
    ]
    data, losses = PairSet(sequences, np.arange(18, dtype=np.int32).reshape(-1, 2)), []
    module = PreferenceModule(
        policy, data, beta=0.1, learning_rate=1e-3, tokens_per_batch=16, gradient_clip_norm=0.05
    )

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append(trainer.callback_metrics["verifier_loss"].item())

    kind = {"devices": 1}
    if sizes is not None:
        kind = {"devices": 2, "strategy": ModelParallelStrategy(*sizes)}
    pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        callbacks=[Watch()], **kind,
    ).fit(module, pair_loader(data, batch_size=4, seed=0))  # fmt: skip
    # The last batch has one pair: a data-parallel rank has none.
    norms = {name: each.norm().item() for name, each in policy_weights(module.model)}
    return {"losses": losses, "norms": norms, "reference": module.reference.tolist()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    job = json.loads(sys.argv[1])
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data_parallel", "tensor_parallel"))
    families = {name: gradient_errors(each, mesh) for name, each in job["families"].items()}
    folder = Path(job["result"]).parent
    learned = {str(sizes): learn(job["verifier"], sizes, folder) for sizes in ((1, 2), (2, 1))}
    if dist.get_rank() == 0:
        Path(job["result"]).write_text(json.dumps({"families": families, "learned": learned}))
    dist.destroy_process_group()
