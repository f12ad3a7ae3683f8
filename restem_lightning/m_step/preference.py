"""A verifier trained from a policy by direct preference optimization (DPO).

Shape legend: P pairs of a batch, S distinct sequences.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import AdamW
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from restem_lightning.m_step.fsdp import shard_policy
from restem_lightning.m_step.likelihood import all_logprobs, sequence_logprobs
from restem_lightning.m_step.module import clip_gradients, load_policy
from restem_lightning.m_step.packing import TrainingSequence


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

    def configure_model(self) -> None:
        """Loads the weights, and shards them under ModelParallelStrategy."""
        if self.model is None:
            model = load_policy(self.policy)
            if self.device_mesh is not None:
                shard_policy(model, self.device_mesh["data_parallel"])
            self.model = model

    def configure_optimizers(self) -> AdamW:
        """AdamW without decay."""
        return AdamW(self.parameters(), lr=self.learning_rate, weight_decay=0.0)

    def on_train_start(self) -> None:
        """Scores every sequence by the reference, which the model still is."""
        self.reference = all_logprobs(
            self.model, self.data.sequences, self.device, tokens_per_batch=self.tokens_per_batch
        )

    def training_step(self, batch: list[tuple[int, int]], batch_index: int) -> Tensor:
        """One optimizer step on a batch of pairs."""
        numbers = [number for pair in zip(*batch, strict=True) for number in pair]
        sequences = [self.data.sequences[number] for number in numbers]
        ratios = sequence_logprobs(self.model, sequences, self.device)
        ratios = ratios - self.reference[numbers].to(self.device)
        correct, incorrect = ratios.chunk(2)
        margins = correct - incorrect
        loss = preference_loss(margins, self.beta)
        self.log("verifier_loss", loss, prog_bar=True)
        self.log("verifier_accuracy", (margins > 0).float().mean())
        self.log("verifier_margin", margins.mean())
        return loss

    def on_before_optimizer_step(self, optimizer: AdamW) -> None:
        """Clips the gradient."""
        clip_gradients(list(self.parameters()), self.gradient_clip_norm)


def pair_loader(data: PairSet, *, batch_size: int, seed: int) -> DataLoader:
    """Returns the pairs in batches, shuffled anew in each epoch."""
    return DataLoader(
        data.pairs,
        batch_size=batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(seed),
        collate_fn=list,
    )
