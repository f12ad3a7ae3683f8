"""Low-rank adapters through peft: put in, started, and left out again by merging."""

import math
import zlib
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from restem_lightning.errors import UserError
from restem_lightning.m_step.shards import local, local_index

_ADAPTER = "default"


@dataclass(frozen=True, kw_only=True)
class LoraParams:
    """Low-rank adapters, trained instead of the weights (needs restem-lightning[lora]).

    Each M-step trains fresh adapters on the weights that start_from names, and exports them merged:
    a policy folder is a whole Hugging Face folder either way.

    Args:
        r: rank, at least 1.
        alpha: the update is scaled by alpha / r.
        target_modules: names of the linear layers that get adapters, such as q_proj; null = all
            linear layers but the LM head.
        seed: of the first values of the adapters, 0 or more.
    """

    r: int = 16
    alpha: float = 32.0
    target_modules: list[str] | None = None
    seed: int = 0


def check_peft() -> None:
    """Does nothing if peft is installed.

    Raises:
        UserError: it is not.
    """
    if find_spec("peft") is None:
        raise UserError(
            "model.lora needs peft; pip install 'restem-lightning[lora]', or set it to null"
        )


def add_adapters(model: PreTrainedModel, params: LoraParams) -> None:
    """Puts adapters into the model in place and freezes all else; their values come later.

    Raises:
        UserError: if peft is missing or a value is not allowed.
    """
    if params.r < 1:
        raise UserError(f"lora.r ({params.r}) must be at least 1; raise it")
    check_peft()
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=params.r,
        lora_alpha=params.alpha,
        target_modules=params.target_modules or "all-linear",
        lora_dropout=0.0,
    )
    try:
        inject_adapter_in_model(config, model, _ADAPTER)
    except ValueError as error:
        raise UserError(f"lora.target_modules ({params.target_modules}): {error}") from None


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of an adapter."""
    return ".lora_" in name


@torch.no_grad()
def start_adapters(model: nn.Module, seed: int) -> None:
    """Gives adapters their first values: B is zero, A is drawn as a linear layer's weight is.

    They depend on name and seed alone, so that any number of ranks starts alike.
    """
    for name, parameter in model.named_parameters():
        if not is_adapter(name):
            continue
        values = torch.zeros(parameter.shape)
        if ".lora_A." in name:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
        local(parameter).copy_(values[local_index(parameter)])


def merged(layer: nn.Module, base: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Returns a linear layer's weight with its adapter added, in the weight's dtype.

    Args:
        layer: peft's layer.
        base: its weight, [out, in].
        low: A, [r, in].
        high: B, [out, r].
    """
    update = layer.scaling[_ADAPTER] * (high.float() @ low.float())
    return (base.float() + update).to(base.dtype)
