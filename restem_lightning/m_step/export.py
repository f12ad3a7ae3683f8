"""Policy folders: from trained (sharded) weights to a checked Hugging Face folder, and back."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.pytorch import LightningModule
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from transformers import AutoModelForCausalLM, PreTrainedModel

from restem_lightning.errors import UserError
from restem_lightning.m_step.checkpoints import is_whole
from restem_lightning.m_step.shards import whole
from restem_lightning.m_step.weights import policy_weights, reshard
from restem_lightning.run_dir import read_json

_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf"}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_LOGIT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of the largest logit


def export_policy(
    module: LightningModule | PreTrainedModel,
    destination: str | Path,
    *,
    source_policy: str | Path,
    file_bytes: int = 5 << 30,
) -> None:
    """Writes the module's weights as a policy folder; call it on every rank.

    Weights are gathered one at a time, adapters merged, and go to rank 0's CPU, a file's worth at
    once. Rank 0 writes beside the destination, compares each file with what was gathered and
    the folder's logits with those of the module on a probe, and renames it into place. What was at
    the destination is replaced. Weights keep their training dtype; everything else (tokenizer,
    chat template, EOS) comes from the source policy.

    Args:
        module: the trained module, sharded or not.
        destination: the folder to make.
        source_policy: policy folder that training started from.
        file_bytes: most bytes of a weights file; a single weight may have more.

    Raises:
        UserError: if the source policy is not a whole policy folder.
        RuntimeError: if what was read back differs from what was trained.
    """
    check_policy_folder(source_policy)
    model = module.model if isinstance(module, LightningModule) else module
    probe = _probe_logits(model)
    writes = not dist.is_initialized() or dist.get_rank() == 0
    destination = Path(destination)
    partial = destination.with_name(destination.name + ".partial")
    if writes:
        if partial.exists():  # of a run that was killed
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        _copy_rest(Path(source_policy), partial, model)
    _write_weights(model, partial if writes else None, file_bytes)
    if writes:
        _check_logits(partial, probe)
        _sync(partial)
        if destination.exists():
            shutil.rmtree(destination)
        partial.rename(destination)
    if dist.is_initialized():
        dist.barrier()


def load_best(module: LightningModule, checkpoint_path: str | Path) -> None:
    """Loads a checkpoint's weights into the module in place; call it on every rank.

    Args:
        module: a module whose model is configured, sharded or not.
        checkpoint_path: a single .ckpt file, or the folder that ModelParallelStrategy writes.

    Raises:
        UserError: if there is no checkpoint, or a damaged one.
    """
    path = Path(checkpoint_path)
    if path.exists() and not is_whole(path):
        raise UserError(
            f"checkpoint ({path}) is damaged; delete {path.parent} and give the same command "
            "again: this M-step begins anew"
        )
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
        UserError: if weights, config, tokenizer or EOS token are missing or damaged.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"policy ({path}) must be a folder in Hugging Face layout; download it")
    remedy = "save it with save_pretrained"
    if not (folder / "config.json").is_file():
        raise UserError(f"policy ({path}) must have a config.json; {remedy}")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"policy ({path}) must have *.safetensors weights; {remedy}")
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, framework="pt"):  # compares its length with its header
                pass
        except SafetensorError as error:
            raise UserError(
                f"policy ({path}) has a damaged {file.name} ({error}); copy or download it anew"
            ) from error
    index = folder / "model.safetensors.index.json"
    named = read_json(index)["weight_map"].values() if index.is_file() else ()
    if missing := sorted({name for name in named if not (folder / name).is_file()}):
        raise UserError(f"policy ({path}) lacks {missing[0]}; copy or download it anew")
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise UserError(f"policy ({path}) must have a tokenizer, e.g. tokenizer.json; {remedy}")
    names = ("config.json", "generation_config.json")
    settings = [read_json(folder / name) for name in names if (folder / name).is_file()]
    if all(each.get("eos_token_id") is None for each in settings):
        raise UserError(
            f"policy ({path}) must have an EOS token, or completions never end; set eos_token_id in"
            " generation_config.json"
        )


@torch.no_grad()
def _probe_logits(model: PreTrainedModel) -> Tensor:
    """Logits [1, 8, V] of a fixed probe on the CPU, by a forward of all ranks.

    Under FSDP they are of the compute dtype.
    """
    device = next(model.parameters()).device
    ids = torch.arange(8, device=device)[None] % model.config.get_text_config().vocab_size
    was_training = model.training
    model.eval()
    logits = model(input_ids=ids, use_cache=False).logits.cpu()
    model.train(was_training)
    reshard(model)
    return logits


def _copy_rest(source: Path, folder: Path, model: PreTrainedModel) -> None:
    """Copies all of a policy folder but its weights, whose dtype goes into the config."""
    for file in source.iterdir():
        is_weights = file.suffix in _WEIGHT_SUFFIXES or file.name.endswith(".index.json")
        if file.is_file() and not is_weights:
            shutil.copyfile(file, folder / file.name)
    config = json.loads((source / "config.json").read_text())
    config.pop("torch_dtype", None)  # its name before transformers 5
    config["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _write_weights(model: PreTrainedModel, folder: Path | None, file_bytes: int) -> None:
    """Writes weights and persistent buffers, an index too if they take more than one file.

    Args:
        model: gathered by all ranks.
        folder: where to; None on a rank that only takes part.
        file_bytes: most bytes of a file.
    """
    files: list[list[str]] = []  # the names in each
    held: dict[str, Tensor] = {}
    total = 0

    def close_file() -> None:
        files.append(list(held))
        _save_checked(held, folder / f"part-{len(files)}.safetensors")
        held.clear()

    for name, weight in _all_weights(model):
        if folder is None:
            continue
        if held and sum(map(_num_bytes, held.values())) + _num_bytes(weight) > file_bytes:
            close_file()
        held[name] = weight.to("cpu").contiguous()
        total += _num_bytes(weight)
    if folder is None:
        return
    close_file()
    places = {}
    for number, names in enumerate(files, 1):
        part = f"model-{number:05}-of-{len(files):05}.safetensors"
        part = part if len(files) > 1 else "model.safetensors"
        (folder / f"part-{number}.safetensors").rename(folder / part)
        places |= dict.fromkeys(names, part)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _all_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    yield from policy_weights(model)
    persistent = model.state_dict()
    yield from ((name, whole(each)) for name, each in model.named_buffers() if name in persistent)


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _save_checked(weights: dict[str, Tensor], file: Path) -> None:
    """Writes a file of weights and reads it back.

    Raises:
        RuntimeError: what was read back differs.
        OSError: the file cannot be written.
    """
    try:
        save_file(weights, file, metadata={"format": "pt"})
    except SafetensorError as error:  # the system's error is in its text only
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(file)) from error
    with safe_open(file, framework="pt") as saved:
        names = set(saved.keys()) ^ set(weights)
        names |= {n for n, each in weights.items() if not torch.equal(saved.get_tensor(n), each)}
    if names:
        raise RuntimeError(f"{file} differs from the trained weights in {sorted(names)}")


def _check_logits(folder: Path, probe: Tensor) -> None:
    """Loads the folder as a user would.

    Raises:
        RuntimeError: it is not what was trained.
    """
    check_policy_folder(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    error = (_probe_logits(model) - probe).abs().max() / probe.abs().max()
    if not error <= _LOGIT_TOLERANCE[probe.dtype]:
        raise RuntimeError(f"{folder} gives other logits than the trained model, by {error:.1e}")


def _sync(folder: Path) -> None:
    """Forces the files to disk, so that the rename cannot come before their contents."""
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
