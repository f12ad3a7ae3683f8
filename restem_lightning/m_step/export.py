"""Policy folders: from trained (sharded) weights to a checked Hugging Face folder, and back."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from transformers import AutoModelForCausalLM, PreTrainedModel

from restem_lightning.errors import UserError

_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf"}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_LOGIT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of the largest logit


def export_policy(
    module: LightningModule | PreTrainedModel,
    destination: str | Path,
    *,
    source_policy: str | Path,
) -> None:
    """Writes the module's weights as a policy folder; call it on every rank.

    Rank 0 writes beside the destination, reads it back, compares every parameter and the logits of
    a probe, and renames it into place. What was at the destination is replaced. Weights keep their
    training dtype; everything else (tokenizer, chat template, EOS) comes from the source policy.

    Args:
        module: the trained module, sharded or not.
        destination: the folder to make.
        source_policy: policy folder that training started from.

    Raises:
        UserError: if the source policy is not a whole policy folder.
        RuntimeError: if what was read back differs from what was trained.
    """
    check_policy_folder(source_policy)
    model = module.model if isinstance(module, LightningModule) else module
    probe = _probe_logits(model)
    weights = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if not dist.is_initialized() or dist.get_rank() == 0:
        destination = Path(destination)
        partial = destination.with_name(destination.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        _write(weights, partial, Path(source_policy))
        _verify(partial, weights, probe)
        _sync(partial)
        shutil.rmtree(destination, ignore_errors=True)
        partial.rename(destination)
    if dist.is_initialized():
        dist.barrier()


def load_best(module: LightningModule, checkpoint_path: str | Path) -> None:
    """Loads a checkpoint's weights into the module in place; call it on every rank.

    Args:
        module: a module whose model is configured, sharded or not.
        checkpoint_path: a single .ckpt file, or the folder that ModelParallelStrategy writes.

    Raises:
        UserError: if there is no checkpoint.
    """
    path = Path(checkpoint_path)
    if path.is_dir():
        state = {"state_dict": get_model_state_dict(module)}
        dcp.load(state, checkpoint_id=path)
        set_model_state_dict(module, state["state_dict"])
    elif path.is_file():
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        set_model_state_dict(
            module, checkpoint["state_dict"], options=StateDictOptions(full_state_dict=True)
        )
    else:
        raise UserError(f"checkpoint ({path}) must be a file or folder; run the M-step again")


def policy_hash(folder: str | Path) -> str:
    """Returns SHA-256 (hex) over weights, config and tokenizer.json of a policy folder."""
    folder = Path(folder)
    names = [path.name for path in folder.glob("*.safetensors")]
    names += [name for name in ("config.json", "tokenizer.json") if (folder / name).is_file()]
    total = hashlib.sha256()
    for name in sorted(names):
        digest = hashlib.sha256()
        with (folder / name).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        total.update(f"{name} {digest.hexdigest()}\n".encode())
    return total.hexdigest()


def check_policy_folder(path: str | Path) -> None:
    """Checks that a folder has all that sampling and training need.

    Raises:
        UserError: if weights, config, tokenizer or EOS token are missing.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"policy ({path}) must be a folder in Hugging Face layout; download it")
    remedy = "save it with save_pretrained"
    if not (folder / "config.json").is_file():
        raise UserError(f"policy ({path}) must have a config.json; {remedy}")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"policy ({path}) must have *.safetensors weights; {remedy}")
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise UserError(f"policy ({path}) must have a tokenizer, e.g. tokenizer.json; {remedy}")
    settings = [folder / "generation_config.json", folder / "config.json"]
    if not any(
        json.loads(file.read_text()).get("eos_token_id") is not None
        for file in settings
        if file.is_file()
    ):
        raise UserError(
            f"policy ({path}) must have an EOS token, or completions never end; set eos_token_id in"
            " generation_config.json"
        )


@torch.no_grad()
def _probe_logits(model: PreTrainedModel) -> Tensor:
    """Logits [1, 8, V] of a fixed probe on the CPU, by a forward of all ranks."""
    device = next(model.parameters()).device
    ids = torch.arange(8, device=device)[None] % model.config.get_text_config().vocab_size
    was_training = model.training
    model.eval()
    logits = model(input_ids=ids, use_cache=False).logits.cpu()
    model.train(was_training)
    return logits


def _write(weights: dict[str, Tensor], folder: Path, source: Path) -> None:
    dtype = next(iter(weights.values())).dtype
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    model.load_state_dict(weights)
    model.save_pretrained(folder)
    for file in source.iterdir():
        is_weights = file.suffix in _WEIGHT_SUFFIXES or file.name.endswith(".index.json")
        if file.is_file() and not is_weights and file.name != "config.json":
            shutil.copyfile(file, folder / file.name)


def _verify(folder: Path, weights: dict[str, Tensor], probe: Tensor) -> None:
    check_policy_folder(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=next(iter(weights.values())).dtype)
    saved = model.state_dict()
    differing = [name for name, value in weights.items() if not torch.equal(saved[name], value)]
    if differing or saved.keys() != weights.keys():
        raise RuntimeError(f"{folder} differs from the trained weights in {differing or 'names'}")
    error = (_probe_logits(model) - probe).abs().max() / probe.abs().max()
    if not error <= _LOGIT_TOLERANCE[probe.dtype]:
        raise RuntimeError(f"{folder} gives other logits than the trained model, by {error:.1e}")


def _sync(folder: Path) -> None:
    """Forces the files to disk, so that the rename cannot come before their contents."""
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
