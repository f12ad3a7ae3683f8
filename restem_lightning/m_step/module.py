"""The M-step as a LightningModule: weighted maximum likelihood on completion tokens."""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ParallelStrategy
from torch.distributed.fsdp import FSDPModule
from torch.optim import AdamW
from transformers import PreTrainedModel

from restem_lightning.errors import UserError
from restem_lightning.m_step.export import check_policy_folder
from restem_lightning.m_step.fsdp import decoder_layers
from restem_lightning.m_step.lora import LoraParams, add_adapters, start_adapters
from restem_lightning.m_step.loss import LossNorm, target_factors
from restem_lightning.m_step.optimization import Schedule, clip_gradients, learning_rate_factor
from restem_lightning.m_step.packing import StepBatch
from restem_lightning.m_step.placement import data_rank, place_policy
from restem_lightning.m_step.probe import check_packing
from restem_lightning.m_step.tensor_parallel import average_copies, check_compile, tensor_group
from restem_lightning.m_step.weights import empty_policy, load_policy

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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
        reshard_after_forward: bool = True,
        compile: bool = False,
        lora: LoraParams | None = None,
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
                (8 bytes per parameter; updates below 1/256 of a weight are lost). Under FSDP
                bf16-mixed gathers weights in bfloat16; gradients are summed over ranks in float32
                always.
            activation_checkpointing: recompute each layer in the backward pass: less memory, about
                a third more time.
            reshard_after_forward: under FSDP, true = a layer's weights are gathered for its forward
                pass and again for its backward pass, and gradients are summed up after each
                micro-batch (least memory); false = each rank keeps whole weights and gradients
                until the optimizer step, for which both travel once.
            compile: torch.compile of each decoder layer but its attention: minutes at the start;
                not with tensor parallelism.
            lora: low-rank adapters instead of all weights, e.g. {r: 16, alpha: 32}; null = all
                weights. start_from then names the weights under fresh adapters.

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
        self.reshard_after_forward = reshard_after_forward
        self.compile_layers = compile
        self.lora = lora
        self.model: PreTrainedModel | None = None

    def configure_model(self) -> None:
        """Loads the policy, sharded under ModelParallelStrategy; a second call does nothing.

        Raises:
            UserError: if the policy folder is not whole, or does not split as asked for.
        """
        if self.model is not None:
            return
        check_policy_folder(self.policy)
        dtype, mesh = _DTYPES[self.dtype_name], self.device_mesh
        model = (
            load_policy(self.policy, dtype) if mesh is None else empty_policy(self.policy, dtype)
        )
        if self.lora is not None:
            add_adapters(model, self.lora)
        if self.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if self.compile_layers:
            group = tensor_group(mesh)
            check_compile(1 if group is None else group.size())
            for layer in decoder_layers(model):  # inside of what FSDP does around a layer
                layer.forward = torch.compile(layer.forward, dynamic=True)
        if mesh is not None:
            half = str(self.trainer.precision) == "bf16-mixed"
            place_policy(
                model,
                self.policy,
                mesh,
                self.trainer.strategy.root_device,
                compute_dtype=torch.bfloat16 if half else None,
                reshard_after_forward=self.reshard_after_forward,
            )
        if self.lora is not None:
            start_adapters(model, self.lora.seed)
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
        with self.trainer.precision_plugin.forward_context():
            check_packing(self.model, self.device)

    def training_step(self, batch: StepBatch, batch_index: int) -> None:
        """One optimizer step: backward per micro-batch, clip, AdamW."""
        strategy, optimizer = self.trainer.strategy, self.optimizers()
        _, num_ranks = data_rank(strategy)
        group = tensor_group(self.device_mesh)
        loss = torch.zeros((), device=self.device)
        for index, micro_batch in enumerate(batch.micro_batches):
            factors = target_factors(micro_batch, batch, self.loss_norm)
            with self._gradient_sync(index == len(batch.micro_batches) - 1):
                part = self.model.weighted_loss(micro_batch, factors, group)
                self.manual_backward(part * num_ranks)  # strategies average over ranks
            loss += part.detach()
        if group is not None:
            average_copies(list(self.parameters()), group)
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
        self.log("train_loss", strategy.reduce(num_ranks * loss), prog_bar=True)
        self.log("gradient_norm", norm)
        self.log("learning_rate", learning_rate)
        self.log("num_tokens", float(batch.num_target_tokens))

    def validation_step(self, batch: Any, batch_index: int) -> None:
        """Does nothing: a callback measures the reward in `on_validation_epoch_end`.

        Lightning runs that hook, and the stop rules after it, only if there is a validation loop.
        """

    def _gradient_sync(self, is_last: bool) -> AbstractContextManager[None]:
        """Ranks sum up gradients at the last micro-batch; with resharding FSDP does at each."""
        if isinstance(self.model, FSDPModule):
            shares = is_last or self.reshard_after_forward
            self.model.set_requires_gradient_sync(shares)
            self.model.set_reshard_after_backward(shares)
        elif not is_last and isinstance(self.trainer.strategy, ParallelStrategy):
            return self.trainer.strategy.block_backward_sync()
        return nullcontext()


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{name} ({value}) must be one of {', '.join(allowed)}; choose one")
