"""The M-step as a LightningModule: weighted maximum likelihood on completion tokens.

Shape legend: B rows of a micro-batch, T tokens of a row, N target tokens, V vocabulary.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import AdamW
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from restem_lightning.errors import UserError
from restem_lightning.m_step.export import check_policy_folder
from restem_lightning.m_step.fsdp import shard_policy
from restem_lightning.m_step.packing import MicroBatch, StepBatch

LossNorm = Literal["token", "sequence"]
Schedule = Literal["constant", "linear", "cosine"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Share of the largest logit. Measured in float32: at most 4e-7 where packing is right (9 families),
# 0.006 to 1 for Bloom, Falcon, Mamba and LFM2. TF32 needs the room between.
_PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


def load_policy(policy: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Returns the policy in training mode, without dropout and without a KV cache.

    Attention is SDPA, or eager for models that cap attention logits (Gemma 2), which SDPA cannot.
    """
    config = AutoConfig.from_pretrained(policy)
    for name, value in vars(config).items():
        if isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
            setattr(config, name, 0.0)
    config.use_cache = False
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    model = AutoModelForCausalLM.from_pretrained(
        policy, config=config, dtype=dtype, attn_implementation="eager" if capped else "sdpa"
    )
    return model.train()


def target_logits(model: PreTrainedModel, micro_batch: MicroBatch) -> Tensor:
    """Returns the logits at the targets, [N, V], through the model's own forward.

    The other positions are dropped at the LM head's input: prompt and padding never cost a
    vocabulary-sized row, and whatever the architecture does to logits (softcapping, scaling) still
    happens. There is no attention mask: transformers derives each layer's (causal, per sequence,
    with its sliding window) from the restarts in the positions.
    """
    index = micro_batch.target_index
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, args: (args[0].flatten(0, 1).index_select(0, index),)
    )
    try:
        return model(
            input_ids=micro_batch.input_ids,
            position_ids=micro_batch.position_ids,
            use_cache=False,
        ).logits
    finally:
        hook.remove()


def micro_batch_loss(
    model: PreTrainedModel, micro_batch: MicroBatch, batch: StepBatch, loss_norm: LossNorm
) -> Tensor:
    """Returns this micro-batch's share of the optimizer step's loss; the shares add up to it.

    With nll the negative log-likelihood of a completion token and w its sequence's weight:
    "token" is sum(w * nll) / number of target tokens, "sequence" is the mean over sequences of
    w * mean(nll). Counts are of the whole optimizer step over all ranks, of non-zero weight.
    Source: arXiv 2312.06585, algorithm 1 (reward-weighted likelihood; its norm is not stated).
    """
    logits = target_logits(model, micro_batch).float()
    nll = F.cross_entropy(logits, micro_batch.target_ids, reduction="none")
    weighted = nll * micro_batch.target_weights
    if loss_norm == "token":
        return weighted.sum() / max(1, batch.num_target_tokens)
    return (weighted / micro_batch.target_lengths).sum() / max(1, batch.num_sequences)


def clip_gradients(parameters: list[Tensor], max_norm: float | None) -> Tensor:
    """Scales gradients to a global L2 norm of at most max_norm; returns the norm before.

    The norm is over all ranks' shards: for DTensors torch may leave the sum pending, and
    `full_tensor` completes it.
    """
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if max_norm is not None:
        clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def learning_rate_factor(
    step: int, *, warmup_steps: int, total_steps: float, schedule: Schedule
) -> float:
    """Returns the share of the peak learning rate at an optimizer step (0-based), in (0, 1]."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    left = (total_steps - step) / max(1, total_steps - warmup_steps)
    return left if schedule == "linear" else (1 - math.cos(math.pi * left)) / 2


class PolicyModule(LightningModule):
    """A policy in fine-tuning. One fit only: make a new one for each M-step."""

    def __init__(
        self,
        policy: str,
        *,
        learning_rate: float = 1e-5,
        weight_decay: float = 0.0,
        warmup_fraction: float = 0.03,
        schedule: Schedule = "constant",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        gradient_clip_norm: float | None = 1.0,
        loss_norm: LossNorm = "token",
        dtype: Literal["float32", "bfloat16"] = "float32",
        activation_checkpointing: bool = False,
    ) -> None:
        """Sets how the policy is fine-tuned. Dropout is always off.

        Args:
            policy: folder in Hugging Face layout of the weights to start from.
            learning_rate: peak learning rate of AdamW, more than 0.
            weight_decay: AdamW's decoupled decay of matrices (not of biases and norms), 0 or more.
            warmup_fraction: share of the optimizer steps over which the learning rate rises
                linearly, 0 to 1.
            schedule: after the warm-up, "constant", "linear" (to 0 at the end) or "cosine" (to 0).
            betas: AdamW's decay rates of the first and second moment.
            eps: AdamW's denominator term, more than 0.
            gradient_clip_norm: most global L2 norm of the gradient of an optimizer step; null =
                no clipping. Leave trainer.gradient_clip_val unset.
            loss_norm: "token" = mean over the completion tokens of an optimizer step; "sequence" =
                mean over tokens within each completion, then over completions.
            dtype: of parameters, gradients and Adam's moments. "float32" with
                trainer.precision=bf16-mixed computes in bfloat16 and keeps float32 weights (16
                bytes per parameter); "bfloat16" with the default precision keeps all in bfloat16
                (8 bytes per parameter; updates below 1/256 of a weight are lost).
            activation_checkpointing: recompute each layer in the backward pass: less memory, about
                a third more time.

        Raises:
            UserError: if a value is not allowed.
        """
        super().__init__()
        _check_choice("schedule", schedule, ("constant", "linear", "cosine"))
        _check_choice("loss_norm", loss_norm, ("token", "sequence"))
        _check_choice("dtype", dtype, tuple(_DTYPES))
        for name, value, allowed in (
            ("learning_rate", learning_rate, learning_rate > 0),
            ("gradient_clip_norm", gradient_clip_norm, (gradient_clip_norm or 1) > 0),
        ):
            if not allowed:
                raise UserError(f"{name} ({value}) must be more than 0; raise it")
        if not 0 <= warmup_fraction <= 1:
            raise UserError(f"warmup_fraction ({warmup_fraction}) must be 0 to 1; change it")
        self.automatic_optimization = False  # one batch = one optimizer step of many micro-batches
        self.policy = policy
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_fraction = warmup_fraction
        self.schedule = schedule
        self.betas = betas
        self.eps = eps
        self.gradient_clip_norm = gradient_clip_norm
        self.loss_norm = loss_norm
        self.dtype_name = dtype
        self.activation_checkpointing = activation_checkpointing
        self.model: PreTrainedModel | None = None

    def configure_model(self) -> None:
        """Loads the policy, and shards it under ModelParallelStrategy; a second call does nothing.

        Raises:
            UserError: if the policy folder is not whole, or tensor parallelism is asked for.
        """
        if self.model is not None:
            return
        check_policy_folder(self.policy)
        model = load_policy(self.policy, _DTYPES[self.dtype_name])
        if self.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if self.device_mesh is not None:
            if (size := self.device_mesh["tensor_parallel"].size()) > 1:
                raise UserError(
                    f"tensor_parallel_size ({size}) must be 1; set data_parallel_size to the"
                    " number of devices"
                )
            shard_policy(model, self.device_mesh["data_parallel"])
        self.model = model

    def configure_optimizers(self) -> AdamW:
        """AdamW over the (sharded) parameters.

        The learning rate is set at each optimizer step from its index: there is no scheduler state
        to restore, and asking for the number of steps here would load the training data before
        Lightning restores its place (lightning 2.6.6: `FitLoop.setup_data` returns early then).
        """
        parameters = [p for p in self.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        return AdamW(
            [group for group in groups if group["params"]],
            lr=self.learning_rate,
            betas=tuple(self.betas),
            eps=self.eps,
            fused=True,
        )

    def on_train_start(self) -> None:
        """Checks what would otherwise go wrong in silence.

        Raises:
            UserError: if the precision, the schedule or the architecture is not supported.
        """
        assert self.model is not None
        assert self.model.training, "transformers loads in eval mode; load_policy must undo that"
        if str(self.trainer.precision).startswith("16"):
            raise UserError(
                f"trainer.precision ({self.trainer.precision}) must be 32-true or bf16-mixed"
                " (float16 would need loss scaling); change it"
            )
        total_steps = self.trainer.estimated_stepping_batches
        needs_end = self.warmup_fraction > 0 or self.schedule != "constant"
        if needs_end and total_steps in (-1, math.inf):
            raise UserError(
                "trainer.max_epochs and trainer.max_steps (-1) must not both be unlimited; set one,"
                " or schedule to constant and warmup_fraction to 0"
            )
        self._total_steps = total_steps
        self._warmup_steps = round(self.warmup_fraction * total_steps) if needs_end else 0
        check_packing(self.model, self.device)

    def training_step(self, batch: StepBatch, batch_index: int) -> None:
        """One optimizer step: backward per micro-batch, clip, AdamW."""
        strategy, optimizer = self.trainer.strategy, self.optimizers()
        num_ranks = strategy.world_size if isinstance(strategy, ParallelStrategy) else 1
        loss = torch.zeros((), device=self.device)
        for index, micro_batch in enumerate(batch.micro_batches):
            part = micro_batch_loss(self.model, micro_batch, batch, self.loss_norm)
            with self._gradient_sync(index == len(batch.micro_batches) - 1):
                self.manual_backward(part * num_ranks)  # strategies average over ranks
            loss += part.detach()
        norm = clip_gradients(list(self.parameters()), self.gradient_clip_norm)
        if not torch.isfinite(norm):
            raise UserError(
                f"gradient norm ({norm.item()}) at optimizer step {self.global_step} must be"
                f" finite; lower learning_rate ({self.learning_rate}) or use 32-bit precision"
            )
        learning_rate = self.learning_rate * learning_rate_factor(
            self.global_step,
            warmup_steps=self._warmup_steps,
            total_steps=self._total_steps,
            schedule=self.schedule,
        )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad()
        self.log("train_loss", strategy.reduce(loss, reduce_op="sum"), prog_bar=True)
        self.log("gradient_norm", norm)
        self.log("learning_rate", learning_rate)
        self.log("num_tokens", float(batch.num_target_tokens))

    def validation_step(self, batch: Any, batch_index: int) -> None:
        """Does nothing: a callback measures the reward in `on_validation_epoch_end`.

        Lightning runs that hook, and the stop rules after it, only if there is a validation loop.
        """

    def _gradient_sync(self, is_last: bool) -> AbstractContextManager[None]:
        """Ranks add up their gradients once per optimizer step, at the last micro-batch."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(is_last)
        elif not is_last and isinstance(self.trainer.strategy, ParallelStrategy):
            return self.trainer.strategy.block_backward_sync()
        return nullcontext()


@torch.no_grad()
def check_packing(model: PreTrainedModel, device: torch.device) -> None:
    """Checks on 16 tokens that a packed sequence gets the logits that it gets alone.

    Layers that carry state along the row (convolutions, recurrences) or count positions by
    themselves (ALiBi) would leak one sequence into the next; they show here.

    Raises:
        UserError: if they differ.
    """
    size = 8
    ids = torch.arange(2 * size, device=device)[None] % model.config.get_text_config().vocab_size
    positions = torch.arange(size, device=device).repeat(1, 2)
    model.eval()
    packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, size:]
    alone = model(input_ids=ids[:, size:], position_ids=positions[:, size:], use_cache=False).logits
    model.train()
    error = (packed - alone).abs().max() / alone.abs().max()
    if not error <= _PROBE_TOLERANCE[alone.dtype]:
        raise UserError(
            f"policy architecture ({type(model).__name__}) mixes packed sequences (logits differ by"
            f" {error:.1e}); attention-only decoders are supported; use another policy"
        )


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{name} ({value}) must be one of {', '.join(allowed)}; choose one")
