"""The accepted dataset as a Lightning datamodule: one batch is one optimizer step."""

import numpy as np
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from restem_lightning.errors import UserError
from restem_lightning.m_step.packing import StepBatch, pack_step
from restem_lightning.m_step.placement import data_rank
from restem_lightning.m_step.sequences import StoredSequences, write_sequences
from restem_lightning.m_step.step_loader import StepLoader


class AcceptedDataModule(LightningDataModule):
    """The accepted dataset, shuffled, packed and shared out to the ranks."""

    def __init__(
        self,
        accepted: str | None = None,
        *,
        batch_size: int = 64,
        max_sequence_tokens: int | None = None,
        tokens_per_micro_batch: int = 4096,
        shared_prompt_packing: bool = True,
        seed: int = 0,
    ) -> None:
        """Sets what an optimizer step holds; memory knobs change no result.

        Args:
            accepted: parquet file of the accepted dataset; the loop sets it, once the E-step is
                done.
            batch_size: sequences per optimizer step over all ranks, at least 1; the last step of an
                epoch takes what is left.
            max_sequence_tokens: most tokens of prompt and completion, at least 2; longer sequences
                are dropped with a warning. null = nothing is dropped.
            tokens_per_micro_batch: most tokens that go through the model at once on one rank (at
                least one sequence does); lower it if memory runs out.
            shared_prompt_packing: whether what the prompts of a micro-batch begin with alike
                (few-shot preamble, question of several completions) goes through the model once.
                Gradients are the same up to rounding; false saves nothing but shows that.
            seed: seed of the shuffle, 0 or more; each epoch has its own order.

        Raises:
            UserError: if a number is out of its range.
        """
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("max_sequence_tokens", max_sequence_tokens, 2),
            ("tokens_per_micro_batch", tokens_per_micro_batch, 1),
            ("seed", seed, 0),
        ):
            if value is not None and value < least:
                raise UserError(f"{name} ({value}) must be at least {least}; raise it")
        self.accepted = accepted
        self.batch_size = batch_size
        self.max_sequence_tokens = max_sequence_tokens
        self.tokens_per_micro_batch = tokens_per_micro_batch
        self.shared_prompt_packing = shared_prompt_packing
        self.seed = seed

    def train_dataloader(self) -> StepLoader[StepBatch]:
        """Reads the accepted dataset (only now: the E-step ends after `setup`).

        Raises:
            UserError: if there is no accepted dataset or nothing in it can be trained on.
        """
        if self.accepted is None:
            raise UserError("accepted (null) must be a parquet file; set data.accepted")
        if self.trainer is None or self.trainer.is_global_zero:
            write_sequences(self.accepted)
        if self.trainer is not None:
            self.trainer.strategy.barrier()
        sequences = StoredSequences(self.accepted)
        lengths = sequences.lengths()
        longest = int(lengths.max())
        most = self.max_sequence_tokens or longest
        kept = sequences if longest <= most else sequences.where(lengths <= most)
        dropped = len(sequences) - len(kept)
        if not kept:
            raise UserError(
                f"max_sequence_tokens ({most}) is less than every sequence of {self.accepted};"
                f" raise it to {longest}, the longest"
            )
        if dropped:
            rank_zero_warn(
                f"max_sequence_tokens ({most}) drops {dropped} of {len(sequences)} sequences;"
                f" the longest has {longest} tokens"
            )
        strategy = self.trainer.strategy if self.trainer is not None else None
        rank, num_ranks = data_rank(strategy)

        def pack(numbers: np.ndarray) -> StepBatch:
            return pack_step(
                [kept[number] for number in numbers],
                tokens_per_micro_batch=self.tokens_per_micro_batch,
                shared_prompts=self.shared_prompt_packing,
                rank=rank,
                num_ranks=num_ranks,
            )

        return StepLoader(len(kept), pack, batch_size=self.batch_size, seed=self.seed)

    def val_dataloader(self) -> range:
        """One empty batch: validation is a hook for measuring reward by sampling, not a loss."""
        return range(1)
