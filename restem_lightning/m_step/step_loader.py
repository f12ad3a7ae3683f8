"""The batches of a training, one for each optimizer step, from any of them on."""

import math
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import numpy as np

from restem_lightning.m_step.packing import epoch_order

Batch = TypeVar("Batch")


class StepLoader(Generic[Batch]):
    """Yields one batch per optimizer step; resumable at any of them.

    The place is (epoch, next_step), counted here: Lightning saves and restores it through
    `state_dict` and `load_state_dict`, so a resumed training goes on with exactly the next batch.
    """

    def __init__(
        self,
        num_items: int,
        make_batch: Callable[[np.ndarray], Batch],
        *,
        batch_size: int,
        seed: int,
    ) -> None:
        """Begins at the first step.

        Args:
            num_items: what an epoch goes through, each item once.
            make_batch: takes the numbers of the items of an optimizer step, over all ranks.
            batch_size: items of an optimizer step; the last one of an epoch takes what is left.
            seed: of the order; each epoch has its own.
        """
        self.num_items = num_items
        self.make_batch = make_batch
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        self.next_step = 0

    def __len__(self) -> int:
        """Optimizer steps of an epoch."""
        return math.ceil(self.num_items / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Yields as many batches as an epoch has, from the current place on.

        Lightning takes what its own epoch still needs (less, after a resume or under
        `limit_train_batches`) and never asks for the end, so the place moves with each batch.
        """
        order, ordered_epoch = None, None
        for _ in range(len(self)):
            if self.next_step == len(self):
                self.epoch, self.next_step = self.epoch + 1, 0
            if ordered_epoch != self.epoch:
                order = epoch_order(self.num_items, self.seed, self.epoch)
                ordered_epoch = self.epoch
            at = self.next_step * self.batch_size
            self.next_step += 1
            yield self.make_batch(order[at : at + self.batch_size])

    def state_dict(self) -> dict[str, int]:
        """The place of the next batch."""
        return {"epoch": self.epoch, "next_step": self.next_step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes to a place that `state_dict` gave."""
        self.epoch, self.next_step = state["epoch"], state["next_step"]
