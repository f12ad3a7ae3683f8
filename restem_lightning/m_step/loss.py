"""The loss of the M-step, without the logits of the whole micro-batch at any time.

Shape legend: T tokens of a micro-batch, N target tokens, C of them in a chunk, E hidden size,
V vocabulary.
"""

from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from transformers import PretrainedConfig, PreTrainedModel

from restem_lightning.m_step.attention import PackedAttention
from restem_lightning.m_step.packing import MicroBatch, StepBatch

LossNorm = Literal["token", "sequence"]
CHUNK_LOGITS = 1 << 27  # most logits at once: 512 MiB in float32


class Head(NamedTuple):
    """What a family does to its logits: cap * tanh(scale * logits / cap), cap None for no cap."""

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: PretrainedConfig) -> "Head":
        """Reads it off the config, under the names that families use for it."""
        scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
        scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
        return cls(scale, getattr(config, "final_logit_softcapping", None))  # Gemma


PLAIN_HEAD = Head()


def target_logits(model: PreTrainedModel, micro_batch: MicroBatch) -> Tensor:
    """Returns the logits at the targets, [N, V], through the model's own forward.

    The other positions are dropped at the LM head's input; whatever the architecture does to
    logits still happens.
    """
    index = micro_batch.target_index
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, args: (args[0].flatten(0, 1).index_select(0, index),)
    )
    try:
        return model(
            input_ids=micro_batch.input_ids,
            position_ids=micro_batch.position_ids,
            packed=PackedAttention(micro_batch.segments),
            use_cache=False,
        ).logits
    finally:
        hook.remove()


def weighted_loss(
    model: PreTrainedModel,
    micro_batch: MicroBatch,
    factors: Tensor,
    group: DeviceMesh | None = None,
) -> Tensor:
    """Returns sum(factors * negative log-likelihood of the targets), float32 [].

    FSDP must know this function as a forward of the model (see fsdp.py): it calls the decoder and
    reads the LM head's weights by itself.

    Args:
        model: the policy.
        micro_batch: its tokens and targets.
        factors: float32 [N].
        group: tensor-parallel ranks that share out the targets at the LM head, which each has
            whole. The loss of the group is then the mean of what its ranks get, and so is the
            gradient of each parameter that they all have whole.
    """
    hidden = model.base_model(
        input_ids=micro_batch.input_ids,
        position_ids=micro_batch.position_ids,
        packed=PackedAttention(micro_batch.segments),
        use_cache=False,
    ).last_hidden_state
    hidden = hidden.flatten(0, 1).index_select(0, micro_batch.target_index)
    target_ids = micro_batch.target_ids
    if group is not None:
        own = slice(group.get_local_rank(), None, group.size())
        hidden = _MeanGradient.apply(hidden, group)[own]
        target_ids, factors = target_ids[own], factors[own] * group.size()
    head = model.get_output_embeddings()
    return linear_cross_entropy(
        hidden,
        head.weight,
        head.bias,
        target_ids,
        factors,
        head=Head.of(model.config.get_text_config()),
    )


def target_factors(micro_batch: MicroBatch, batch: StepBatch, loss_norm: LossNorm) -> Tensor:
    """Returns how much each target's negative log-likelihood counts, float32 [N].

    With nll the negative log-likelihood of a completion token and w its sequence's weight, the loss
    of an optimizer step is for "token" sum(w * nll) / number of target tokens, for "sequence" the
    mean over sequences of w * mean(nll). Counts are of the whole optimizer step over all ranks, of
    non-zero weight; the shares of the micro-batches add up to the loss.
    Source: arXiv 2312.06585, algorithm 1 (reward-weighted likelihood; its norm is not stated).
    """
    if loss_norm == "token":
        return micro_batch.target_weights / max(1, batch.num_target_tokens)
    return micro_batch.target_weights / micro_batch.target_lengths / max(1, batch.num_sequences)


class _MeanGradient(torch.autograd.Function):
    """Gives back what it gets; its gradient is the mean of those of a group's ranks."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: DeviceMesh) -> Tensor:
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        mean = grad / ctx.group.size()
        dist.all_reduce(mean, group=ctx.group.get_group())
        return mean, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    factors: Tensor,
    *,
    head: Head = PLAIN_HEAD,
    chunk_logits: int = CHUNK_LOGITS,
) -> Tensor:
    """Returns sum(factors * cross entropy of the head's logits), float32 [].

    torch's function of this name (2.13) has neither factors per token nor caps.

    Args:
        hidden: [N, E].
        weight: [V, E].
        bias: [V] or None.
        targets: int64 [N].
        factors: float32 [N]; they get no gradient.
        head: what the family does to its logits.
        chunk_logits: most logits in memory at once (one row at least).
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    rows = max(1, chunk_logits // weight.shape[0])
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets, factors, head, rows)


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients chunk by chunk beside the loss: logits are never computed twice."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        factors: Tensor,
        head: Head,
        rows: int,
    ) -> Tensor:
        wanted = [tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)]
        grads = [
            torch.zeros_like(tensor) if want else None
            for want, tensor in zip(wanted, (hidden, weight, bias), strict=True)
        ]
        table = weight.to(hidden.dtype)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        # Autocast would cast the table again for each chunk.
        with torch.autocast(hidden.device.type, enabled=False):
            for at in range(0, len(targets), rows):
                cut = slice(at, at + rows)
                part, slope = _chunk(
                    F.linear(hidden[cut], table, None if bias is None else bias.to(table.dtype)),
                    targets[cut],
                    factors[cut],
                    head,
                )
                loss += part
                if any(wanted):
                    _add_gradients(grads, slope.to(table.dtype), hidden[cut], table, cut)
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = [each if each is None else each.mul_(grad) for each in ctx.saved_tensors]
        return *grads, None, None, None, None


def _chunk(logits: Tensor, targets: Tensor, factors: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """Returns the loss of a chunk and its slope at the linear layer's output, float32 [C, V]."""
    scores = logits.float()
    if head.scale != 1.0:
        scores = scores * head.scale
    if head.cap is not None:
        scores = head.cap * torch.tanh(scores / head.cap)
    norm = torch.logsumexp(scores, -1)
    nll = norm - scores.gather(1, targets[:, None])[:, 0]
    slope = torch.exp(scores - norm[:, None])
    slope.scatter_add_(1, targets[:, None], -torch.ones_like(norm)[:, None])
    slope *= factors[:, None] * head.scale
    if head.cap is not None:
        slope *= 1 - (scores / head.cap).square()
    return (nll * factors).sum(), slope


def _add_gradients(
    grads: list[Tensor | None], slope: Tensor, hidden: Tensor, table: Tensor, cut: slice
) -> None:
    """Adds a chunk's gradients to those of hidden states, weight and bias."""
    grad_hidden, grad_weight, grad_bias = grads
    if grad_hidden is not None:
        torch.mm(slope, table, out=grad_hidden[cut])
    if grad_weight is not None:
        if grad_weight.dtype == slope.dtype:
            grad_weight.addmm_(slope.t(), hidden)
        else:
            grad_weight += slope.t() @ hidden
    if grad_bias is not None:
        grad_bias += slope.sum(0)
