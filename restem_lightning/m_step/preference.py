"""A verifier trained from a policy by direct preference optimization (DPO).

Shape legend: P pairs of a batch, S distinct sequences.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import AdamW
from transformers import PreTrainedModel

from restem_lightning.m_step.likelihood import prompt_groups, sequence_logprobs
from restem_lightning.m_step.optimization import clip_gradients
from restem_lightning.m_step.packing import TrainingSequence
from restem_lightning.m_step.placement import data_rank, place_policy
from restem_lightning.m_step.step_loader import StepLoader
from restem_lightning.m_step.tensor_parallel import average_copies, tensor_group
from restem_lightning.m_step.weights import empty_policy, load_policy


class PairSet(NamedTuple):
    """Pairs over distinct sequences, so that the reference scores each of these once.

    Attributes:
        sequences: the distinct sequences.
        pairs: (index of the correct one, index of the incorrect one).
    """

    sequences: list[TrainingSequence]
    pairs: list[tuple[int, int]]


def pair_set(pairs: Sequence[tuple[tuple, tuple]]) -> PairSet:
    """Returns pairs of (prompt ids, completion ids) as a PairSet."""
    index: dict[tuple, int] = {}
    numbered = [tuple(index.setdefault(one, len(index)) for one in pair) for pair in pairs]
    sequences = [
        TrainingSequence(np.array([*prompt, *completion], dtype=np.int32), len(prompt), 1.0)
        for prompt, completion in index
    ]
    return PairSet(sequences, numbered)


def preference_loss(margins: Tensor, beta: float) -> Tensor:
    """Returns the mean of -log sigmoid(beta * margin).

    Args:
        margins: float [P], of the correct over the incorrect completion: the difference of their
            log-likelihood ratios to the reference.
        beta: how close the verifier stays to the reference, above 0.

    Source: arXiv 2305.18290, equation 7.
    """
    return -F.logsigmoid(beta * margins).mean()


class PreferenceModule(LightningModule):
    """A verifier in training; it starts from its reference. One fit only."""

    def __init__(
        self,
        policy: str,
        data: PairSet,
        *,
        beta: float,
        learning_rate: float,
        tokens_per_batch: int,
        gradient_clip_norm: float | None = 1.0,
    ) -> None:
        """Sets how the verifier is trained.

        Args:
            policy: folder of the weights to start from; the reference too.
            data: the pairs.
            beta: see `preference_loss`.
            learning_rate: of AdamW, constant.
            tokens_per_batch: most tokens that the reference scores at once.
            gradient_clip_norm: most global L2 norm of the gradient; None for no clipping.
        """
        super().__init__()
        self.policy, self.data, self.beta = policy, data, beta
        self.learning_rate, self.tokens_per_batch = learning_rate, tokens_per_batch
        self.gradient_clip_norm = gradient_clip_norm
        self.model: PreTrainedModel | None = None
        self.reference: Tensor | None = None  # float32 [S]; no buffer, which precision may round

    def configure_model(self) -> None:
        """Loads the weights, split and sharded under ModelParallelStrategy.

        Raises:
            UserError: if they do not split as asked for.
        """
        if self.model is not None:
            return
        mesh = self.device_mesh
        if mesh is None:
            self.model = load_policy(self.policy)
        else:
            self.model = empty_policy(self.policy, torch.float32)
            place_policy(self.model, self.policy, mesh, self.trainer.strategy.root_device)

    def configure_optimizers(self) -> AdamW:
        """AdamW without decay."""
        return AdamW(self.parameters(), lr=self.learning_rate, weight_decay=0.0)

    def on_train_start(self) -> None:
        """Scores every sequence by the reference, which the model of a new training still is."""
        if self.reference is None:
            with torch.no_grad(), self.trainer.precision_plugin.forward_context():
                self.reference = self._reference_scores().cpu()

    def _reference_scores(self) -> Tensor:
        """Scores by prompts, which data-parallel ranks share out, float32 [S] on every rank."""
        sequences, strategy = self.data.sequences, self.trainer.strategy
        groups = list(prompt_groups(sequences, tokens_per_batch=self.tokens_per_batch))
        rank, num_ranks = data_rank(strategy)
        own = groups[rank::num_ranks]
        if len(own) < math.ceil(len(groups) / num_ranks):
            own.append(groups[0])  # all go through the model equally often
        scores = torch.zeros(len(sequences), device=self.device)
        for some in own:
            scores[some] = sequence_logprobs(
                self.model, [sequences[number] for number in some], self.device
            )
        return strategy.reduce(scores, reduce_op="min")  # no log-probability is above 0

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the scores: a resumed model is no longer the reference."""
        checkpoint["reference"] = self.reference

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the scores."""
        self.reference = checkpoint["reference"]

    def training_step(self, batch: list[tuple[int, int]], batch_index: int) -> Tensor:
        """One optimizer step on a batch of pairs, of which each rank takes its share."""
        rank, num_ranks = data_rank(self.trainer.strategy)
        own = batch[rank::num_ranks]
        factor = len(own) * num_ranks / len(batch)  # strategies average over ranks
        pairs = own or batch[:1]  # a rank without any takes part in the forward pass too
        numbers = [number for pair in zip(*pairs, strict=True) for number in pair]
        sequences = [self.data.sequences[number] for number in numbers]
        ratios = sequence_logprobs(self.model, sequences, self.device)
        ratios = ratios - self.reference[numbers].to(self.device)
        correct, incorrect = ratios.chunk(2)
        margins = correct - incorrect
        loss = factor * preference_loss(margins, self.beta)
        self.log("verifier_loss", loss, prog_bar=True, sync_dist=True)
        self.log("verifier_accuracy", factor * (margins > 0).float().mean(), sync_dist=True)
        self.log("verifier_margin", factor * margins.mean(), sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_index: int) -> None:
        """Does nothing: Lightning writes checkpoints behind a validation loop."""

    def on_before_optimizer_step(self, optimizer: AdamW) -> None:
        """Clips the gradient."""
        if (group := tensor_group(self.device_mesh)) is not None:
            average_copies(list(self.parameters()), group)
        clip_gradients(list(self.parameters()), self.gradient_clip_norm)


def pair_loader(data: PairSet, *, batch_size: int, seed: int) -> StepLoader[list[tuple[int, int]]]:
    """Returns the pairs in batches over all ranks, shuffled anew in each epoch."""

    def take(numbers: np.ndarray) -> list[tuple[int, int]]:
        return [data.pairs[number] for number in numbers]

    return StepLoader(len(data.pairs), take, batch_size=batch_size, seed=seed)
