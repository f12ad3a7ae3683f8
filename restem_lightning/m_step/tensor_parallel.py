"""Tensor parallelism for the policy: the plan that transformers has for its family, by torch.

The ranks of a group see the same tokens. Each has its own heads and its own part of the MLPs, of
which one sum over the group makes the whole; embeddings, norms and the LM head are there on each.
"""

import re

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from restem_lightning.errors import UserError
from restem_lightning.m_step.shards import local

_STYLES: dict[str, ParallelStyle] = {
    "colwise": ColwiseParallel(),
    "colwise_gather_output": ColwiseParallel(output_layouts=Replicate()),
    "rowwise": RowwiseParallel(),
    "rowwise_split_input": RowwiseParallel(input_layouts=Replicate()),
    # A norm of each head, of which a rank has some: to a DTensor heads are as tokens, more rows
    # over which the gradient of its weight sums.
    "replicated_with_grad_allreduce": SequenceParallel(sequence_dim=2, use_local_output=True),
}


def tensor_group(mesh: DeviceMesh | None) -> DeviceMesh | None:
    """Returns this rank's tensor-parallel group, None if it is alone in it.

    Args:
        mesh: of ModelParallelStrategy; None under another strategy.
    """
    group = None if mesh is None else mesh["tensor_parallel"]
    return group if group is not None and group.size() > 1 else None


def split_policy(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Splits the linear layers of each decoder layer in place; call it before `shard_policy`.

    Args:
        model: the policy on the meta device, with adapters or without.
        mesh: one dimension, a tensor-parallel group.

    Raises:
        UserError: if the family has no plan, or its sizes do not split evenly.
    """
    plan = split_plan(model, mesh.size())
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    parallelize_module(model, mesh, {name: _STYLES[style] for name, style in plan.items()})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)  # torch 2.13: a replicated one forgets it


def split_plan(model: PreTrainedModel, size: int) -> dict[str, str]:
    """Returns transformers' style of each split module by name; embeddings and LM head stay whole.

    Args:
        model: the policy, with adapters or without.
        size: of a tensor-parallel group.

    Raises:
        UserError: if there is no plan for the family, not one that is supported here, or its sizes
            do not split evenly.
    """
    styles = model.tp_plan or {}
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    found = {}
    for name, module in model.named_modules():
        style = styles.get(re.sub(r"\.\d+\.", ".*.", name))
        if style is not None and module not in ends:
            found[name] = style
    if not found:
        raise _refusal(model, "transformers has no plan for this family")
    if unknown := sorted(set(found.values()) - set(_STYLES)):
        raise _refusal(model, f"the styles {', '.join(unknown)} of its plan are not supported")
    for name, style in found.items():
        parent = name.rpartition(".")[0]
        if style == "colwise" and (rest := _unplanned(model, parent, found)):
            raise _refusal(model, f"its plan says nothing of {rest}, which sees a part of the rows")
    plan = {}
    for name, style in found.items():
        plan |= _parts(name, model.get_submodule(name), style)
    _check_sizes(model, found, size)
    return plan


def _refusal(model: PreTrainedModel, reason: str) -> UserError:
    return UserError(
        f"tensor_parallel_size must be 1 for {type(model).__name__}: {reason}; set it to 1, and"
        " data_parallel_size to the number of devices"
    )


def _unplanned(model: nn.Module, parent: str, plan: dict[str, str]) -> str | None:
    """Returns what has parameters beside a split layer and is not in the plan, by name."""
    module = model.get_submodule(parent)
    if own := next(module.named_parameters(recurse=False), None):
        return f"{parent}.{own[0]}"
    for name, child in module.named_children():
        if f"{parent}.{name}" not in plan and next(child.parameters(), None) is not None:
            return f"{parent}.{name}"
    return None


def _parts(name: str, module: nn.Module, style: str) -> dict[str, str]:
    """Returns the plan of one module; of a layer with adapters, the side where its own is split."""
    if not hasattr(module, "lora_A"):
        return {name: style}
    side = "lora_B" if style.startswith("colwise") else "lora_A"
    return {f"{name}.base_layer": style, f"{name}.{side}.default": style}


def _check_sizes(model: PreTrainedModel, plan: dict[str, str], size: int) -> None:
    config = model.config.get_text_config()
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None) or size
        if heads % size:
            raise UserError(
                f"tensor_parallel_size ({size}) must divide the policy's {name} ({heads}); lower it"
                " and raise data_parallel_size"
            )
    for name, style in plan.items():
        module = model.get_submodule(name)
        side = {"colwise": "out_features", "rowwise": "in_features"}.get(style.partition("_")[0])
        if side and (width := getattr(module, side)) % size:
            raise UserError(
                f"tensor_parallel_size ({size}) must divide {side} ({width}) of {name}; lower it"
                " and raise data_parallel_size"
            )


def check_split(policy: str, size: int) -> None:
    """Checks, without its weights, that a policy folder can be split.

    Raises:
        UserError: as `split_plan`.
    """
    config = AutoConfig.from_pretrained(policy)
    with torch.device("meta"):
        split_plan(AutoModelForCausalLM.from_config(config), size)


def check_compile(size: int) -> None:
    """Checks that layers may be compiled in a tensor-parallel group of this size.

    torch 2.13 recurses without end where sizes of a DTensor are symbols, and with fixed sizes each
    micro-batch would be compiled anew.

    Raises:
        UserError: they may not.
    """
    if size > 1:
        raise UserError(
            f"model.compile (true) must be false with tensor_parallel_size ({size}): torch cannot"
            " compile split layers for any number of tokens; set one of them to false or 1"
        )


def average_copies(parameters: list[Tensor], mesh: DeviceMesh) -> None:
    """Averages the gradients of what each rank of a group has whole, so that copies stay copies.

    They differ where the LM head saw other targets (see `weighted_loss`), and by rounding where a
    kernel sums in no fixed order.

    Args:
        parameters: of which those that are split or replicated by torch are passed over.
        mesh: one dimension, the tensor-parallel group.
    """
    for parameter in parameters:
        grad = parameter.grad
        if grad is not None and not (isinstance(grad, DTensor) and grad.device_mesh.ndim > 1):
            dist.all_reduce(local(grad), group=mesh.get_group())
            local(grad).div_(mesh.size())
