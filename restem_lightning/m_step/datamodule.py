"""The accepted dataset as a Lightning datamodule: one batch is one optimizer step."""

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from lightning.pytorch import LightningDataModule
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from restem_lightning.errors import UserError
from restem_lightning.m_step.packing import StepBatch, TrainingSequence, pack_step
from restem_lightning.m_step.step_loader import StepLoader

_COLUMNS = ["prompt_ids", "completion_ids", "weight"]


def read_accepted(path: str | Path) -> list[TrainingSequence]:
    """Returns the sequences of an accepted dataset in file order.

    Raises:
        UserError: if a column is missing, no row is there, or a row cannot be trained on.
    """
    if not Path(path).is_file():
        raise UserError(f"accepted ({path}) must be a parquet file; run the E-step first")
    missing = set(_COLUMNS) - set(pq.read_schema(path).names)
    if missing:
        raise UserError(f"accepted ({path}) must have the columns {_COLUMNS}; add {missing}")
    table = pq.read_table(path, columns=_COLUMNS)
    if table.num_rows == 0:
        raise UserError(
            f"accepted ({path}) holds 0 completions, at least 1 is needed; sample more completions"
            " per problem, use easier problems or a better prompt"
        )
    prompts, completions = (_token_lists(table[name]) for name in _COLUMNS[:2])
    weights = table["weight"].to_numpy()
    sequences = []
    for row, (prompt, completion, weight) in enumerate(
        zip(prompts, completions, weights, strict=True)
    ):
        if len(prompt) == 0 or len(completion) == 0:
            raise UserError(
                f"row {row} of accepted ({path}) has {len(prompt)} prompt and {len(completion)}"
                " completion tokens, each must be at least 1; drop it or add BOS to the prompt"
            )
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError(
                f"weight ({weight}) in row {row} of accepted ({path}) must be finite and >= 0;"
                " mend the weighting"
            )
        ids = np.concatenate([prompt, completion])
        sequences.append(TrainingSequence(ids, len(prompt), float(weight)))
    if not any(sequence.weight > 0 for sequence in sequences):
        raise UserError(f"all weights of accepted ({path}) are 0; at least 1 must be more")
    return sequences


def _token_lists(column: pa.ChunkedArray) -> list[np.ndarray]:
    """Views of each row's int32 ids, without one Python object per token."""
    lists = []
    for chunk in column.chunks:
        values = chunk.flatten().to_numpy().astype(np.int32, copy=False)
        ends = np.cumsum(chunk.value_lengths().to_numpy(zero_copy_only=False))
        lists += np.split(values, ends[:-1])
    return lists


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
        sequences = read_accepted(self.accepted)
        longest = max(len(sequence.ids) for sequence in sequences)
        most = self.max_sequence_tokens or longest
        kept = [sequence for sequence in sequences if len(sequence.ids) <= most]
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
        ranks = {"rank": 0, "num_replicas": 1}
        if isinstance(strategy, ParallelStrategy):
            ranks = strategy.distributed_sampler_kwargs

        def pack(numbers: np.ndarray) -> StepBatch:
            return pack_step(
                [kept[number] for number in numbers],
                tokens_per_micro_batch=self.tokens_per_micro_batch,
                shared_prompts=self.shared_prompt_packing,
                rank=ranks["rank"],
                num_ranks=ranks["num_replicas"],
            )

        return StepLoader(len(kept), pack, batch_size=self.batch_size, seed=self.seed)

    def val_dataloader(self) -> range:
        """One empty batch: validation is a hook for measuring reward by sampling, not a loss."""
        return range(1)
