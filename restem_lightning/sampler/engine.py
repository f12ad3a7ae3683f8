"""Sampler: prompts in, completions out, with everything that makes it fast behind one method."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from restem_kernels.sampling import sample_tokens
from torch import Tensor, nn

from restem_lightning.errors import UserError
from restem_lightning.sampler.batch import build_batch
from restem_lightning.sampler.blocks import BlockPool
from restem_lightning.sampler.params import Request, Sample, SamplingParams, address_key
from restem_lightning.sampler.runner import Runner
from restem_lightning.sampler.scheduler import Scheduler
from restem_lightning.sampler.sequence import Sequence
from restem_lightning.sampler.stop import StopStrings
from restem_lightning.sampler.weights import checksum, load_module, pack_linears, update_weights


@dataclass(frozen=True, kw_only=True)
class EngineParams:
    """How the sampler uses the machine; none of this changes which completions are drawn.

    Args:
        device: cpu, cuda, cuda:0 and so on, or auto for cuda where there is one.
        dtype: float32, bfloat16, or auto for float32 on cpu and bfloat16 on cuda.
        max_batch_size: completions decoded together.
        max_batch_tokens: tokens in one forward pass; 0 for max_batch_size and one block of a prompt
            where batch_invariant, else for 2048.
        block_size: tokens in a block of the KV cache.
        cache_tokens: tokens that the KV cache holds.
        batch_invariant: on computes every completion to the same bits whatever else is in the
            batch, at the cost of full-size passes; auto is on for float32 on cpu, else off.
    """

    device: str = "auto"
    dtype: str = "auto"
    max_batch_size: int = 128
    max_batch_tokens: int = 0
    block_size: int = 32
    cache_tokens: int = 65536
    batch_invariant: str = "auto"

    def __post_init__(self) -> None:
        """Checks every value.

        Raises:
            UserError: naming the value, what is allowed and the remedy.
        """
        allowed = {
            "dtype": ("auto", "float32", "bfloat16"),
            "batch_invariant": ("auto", "on", "off"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise UserError(
                    f"engine.{name} ({getattr(self, name)}) must be one of {', '.join(values)}"
                )
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise UserError(
                f"engine.device ({self.device}) must be auto, cpu, cuda or cuda:0 and so on"
            )
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise UserError(
                f"engine.device is {self.device}, but torch sees no GPU here; set it to cpu"
            )
        for name in ("max_batch_size", "block_size", "cache_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"engine.{name} ({getattr(self, name)}) must be at least 1")
        if self.max_batch_tokens and self.max_batch_tokens < max(
            self.max_batch_size, self.block_size
        ):
            raise UserError(
                f"engine.max_batch_tokens ({self.max_batch_tokens}) must be 0 or at least "
                f"max_batch_size ({self.max_batch_size}) and block_size ({self.block_size})"
            )

    def resolve_device(self) -> torch.device:
        """Returns the device that `device` means here."""
        if self.device != "auto":
            return torch.device(self.device)
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def resolve_dtype(self) -> torch.dtype:
        """Returns the dtype that `dtype` means here."""
        if self.dtype != "auto":
            return getattr(torch, self.dtype)
        return torch.float32 if self.resolve_device().type == "cpu" else torch.bfloat16

    def resolve_batch_invariant(self) -> bool:
        """Returns what `batch_invariant` means here."""
        if self.batch_invariant != "auto":
            return self.batch_invariant == "on"
        return self.resolve_device().type == "cpu" and self.resolve_dtype() == torch.float32


class Sampler:
    """Draws completions from one policy."""

    def __init__(self, policy: str | Path | nn.Module, engine: EngineParams | None = None):
        """Loads the policy and allocates the KV cache.

        Args:
            policy: Hugging Face folder, or a module already behind our attention.
            engine: how to use the machine.
        """
        self.engine = engine or EngineParams()
        self.dtype, self.device = self.engine.resolve_dtype(), self.engine.resolve_device()
        self.owns_module = not isinstance(policy, nn.Module)
        if self.owns_module:
            self.module = load_module(policy, device=self.device, dtype=self.dtype)
            pack_linears(self.module)
        else:
            self.module = policy
        size = self.engine.block_size
        self.num_blocks = -(-self.engine.cache_tokens // size)
        self.runner = Runner(self.module, num_blocks=self.num_blocks, block_size=size)
        self.invariant = self.engine.resolve_batch_invariant()
        smallest = self.engine.max_batch_size + size
        self.max_batch_tokens = self.engine.max_batch_tokens or (
            smallest if self.invariant else max(2048, smallest)
        )
        eos = self.module.generation_config.eos_token_id
        self.eos_ids = tuple([eos] if isinstance(eos, int) else eos or [])
        self.num_preemptions = 0

    def update_weights(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Copies live weights into the sampler's module, see `weights.update_weights`."""
        update_weights(self.module, named)
        if self.owns_module:
            pack_linears(self.module)

    def checksum(self) -> str:
        """Returns the hash of the weights that the next completion is drawn with."""
        return checksum(self.module.named_parameters(), self.dtype)

    def generate(
        self,
        requests: Iterable[Request],
        params: SamplingParams,
        *,
        seed: int,
        iteration: int,
        decode: Callable[[list[int]], str] | None = None,
    ) -> Iterator[Sample]:
        """Yields completions as they finish, in no fixed order.

        Args:
            requests: read as late as possible, so they may be claimed while sampling runs.
            params: how to draw; `n` is not looked at, the requests say which completions.
            seed: part of the address of every draw.
            iteration: part of the address of every draw.
            decode: token ids to text; needed for stop strings only.

        Raises:
            UserError: if the KV cache cannot hold one prompt with its completion, or stop strings
                are given without decode.
        """
        pool = BlockPool(self.num_blocks)
        scheduler = Scheduler(
            requests,
            pool,
            block_size=self.engine.block_size,
            max_batch_size=self.engine.max_batch_size,
            max_batch_tokens=self.max_batch_tokens,
            max_new_tokens=params.max_new_tokens,
            key_of=lambda request_id: address_key(seed, iteration, request_id),
        )
        if params.stop and decode is None:
            raise UserError(
                "sampling.stop needs text; give Sampler.generate the tokenizer's decode"
            )
        stop = StopStrings(params.stop, decode or (lambda ids: ""))
        pad_to = self.max_batch_tokens if self.invariant else 0
        draw = _Drawer(params, self.device)
        while not scheduler.done:
            starting = [s for s in scheduler.admit() if not s.token_ids]
            if starting:
                logits = torch.stack([sequence.prompt.logits for sequence in starting])
                draw(starting, logits)
                yield from self._finished(starting, scheduler, params, stop)
            step = scheduler.plan()
            if not step.decode and not step.prefill:
                continue
            batch = build_batch(
                step, block_size=self.engine.block_size, pad_to=pad_to, device=self.device
            )
            logits = self.runner.forward(batch, pad_to=pad_to)
            sequences = [output for output in batch.outputs if isinstance(output, Sequence)]
            for row, prompt in enumerate(batch.outputs[len(sequences) :], len(sequences)):
                prompt.logits = logits[row].clone()
            for _ in scheduler.complete(step):
                pass
            if sequences:
                draw(sequences, logits[: len(sequences)])
                yield from self._finished(sequences, scheduler, params, stop)
        self.num_preemptions = scheduler.num_preemptions

    def _finished(
        self,
        sequences: list[Sequence],
        scheduler: Scheduler,
        params: SamplingParams,
        stop: StopStrings,
    ) -> Iterator[Sample]:
        """Takes out and yields those of the sequences whose last draw ended them."""
        for sequence in sequences:
            length = len(sequence.token_ids)
            if sequence.token_ids[-1] in self.eos_ids:
                reason = "eos"
            elif (kept := stop.cut(sequence.token_ids)) is not None:
                reason, length = "stop", kept
            elif length >= params.max_new_tokens:
                reason = "length"
            else:
                continue
            scheduler.finish(sequence)
            yield Sample(
                request_id=sequence.request_id,
                index=sequence.index,
                token_ids=tuple(sequence.token_ids[:length]),
                logprobs=tuple(sequence.logprobs[:length]),
                sampling_logprobs=tuple(sequence.sampling_logprobs[:length]),
                finish_reason=reason,
            )


class _Drawer:
    """Draws the next token of each sequence and appends it."""

    def __init__(self, params: SamplingParams, device: torch.device):
        self.device = device
        self.settings = {
            name: getattr(params, name) for name in ("temperature", "top_k", "top_p", "min_p")
        }

    def __call__(self, sequences: list[Sequence], logits: Tensor) -> None:
        def tensor(values: list) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=self.device)

        tokens, logprobs, sampling_logprobs = sample_tokens(
            logits,
            tensor([sequence.key for sequence in sequences]),
            tensor([sequence.index for sequence in sequences]),
            tensor([len(sequence.token_ids) for sequence in sequences]),
            **self.settings,
        )
        columns = (tokens.tolist(), logprobs.tolist(), sampling_logprobs.tolist())
        for sequence, *drawn in zip(sequences, *columns, strict=True):
            sequence.token_ids.append(drawn[0])
            sequence.logprobs.append(drawn[1])
            sequence.sampling_logprobs.append(drawn[2])
