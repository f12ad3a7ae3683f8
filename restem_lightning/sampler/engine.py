"""Sampler: prompts in, completions out, with everything that makes it fast behind one method."""

import importlib.util
import logging
import os
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType

import torch
from restem_kernels import c_library, cpu, cpu_compiled
from torch import Tensor, nn

from restem_lightning.errors import UserError
from restem_lightning.sampler.batch import range_size
from restem_lightning.sampler.blocks import BlockPool
from restem_lightning.sampler.generation import Generation, Machinery, draw_settings, make_step
from restem_lightning.sampler.lanes import Lanes
from restem_lightning.sampler.params import Request, Sample, SamplingParams, address_key
from restem_lightning.sampler.runner import StepGraphs, make_cache, make_model, useful_tokens
from restem_lightning.sampler.scheduler import Limits, Scheduler
from restem_lightning.sampler.stop import StopStrings
from restem_lightning.sampler.weights import checksum, load_module, update_weights

logger = logging.getLogger(__name__)

ROW_STEP = 8  # row counts of forward passes are multiples of this
CPU_BATCH, CUDA_BATCH = 128, 512  # beyond about 512, products are bound by arithmetic
CPU_PREFILL, CUDA_PREFILL = 512, 4096
CPU_CACHE_TOKENS = 65536
CUDA_LAG = 3  # steps that the host may stay behind, so that its other work does not stop the GPU
CUDA_CACHE_SHARE = 0.85  # of the memory that is free once the weights are loaded


@dataclass(frozen=True, kw_only=True)
class EngineParams:
    """How the sampler uses the machine; none of this changes which completions are drawn.

    Args:
        device: cpu, cuda, cuda:0 and so on, or auto for cuda where there is one.
        dtype: float32, bfloat16 (on a cpu without AMX or AVX-512 BF16 several times slower), or
            auto for float32 on cpu and bfloat16 on cuda.
        kernels: c (on cpu; a C compiler, found as CC or gcc, makes them when first used), torch (on
            cpu), triton (on cuda; on cpu for tests with TRITON_INTERPRET=1, which takes thousands
            of times longer), or auto: c on cpu where there is a compiler, else torch.
        max_batch_size: completions decoded together; 0 for 128 on cpu and 512 on cuda.
        prefill_tokens: tokens of prompts in one forward pass; 0 for 512 on cpu and 4096 on cuda.
        block_size: tokens in a block of the KV cache.
        cache_tokens: tokens that the KV cache holds; 0 for 65536 on cpu, and on cuda for as many as
            fit in 85 % of the memory that is free, or fewer if those are all that can be in use.
        threads: of the CPU, while sampling on it; 0 takes one or all that torch may use, whichever
            is faster when a run starts: on a busy machine that is one, by far.
        batch_invariant: on computes every completion to the same bits whatever else is in the
            batch; auto is on for cpu (where it costs nothing with oneDNN), off for cuda (where it
            costs passes of full size).
    """

    device: str = "auto"
    dtype: str = "auto"
    kernels: str = "auto"
    max_batch_size: int = 0
    prefill_tokens: int = 0
    block_size: int = 32
    cache_tokens: int = 0
    threads: int = 0
    batch_invariant: str = "auto"

    def __post_init__(self) -> None:
        """Checks every value.

        Raises:
            UserError: naming the value, what is allowed and the remedy.
        """
        allowed = {
            "dtype": ("auto", "float32", "bfloat16"),
            "kernels": ("auto", "c", "torch", "triton"),
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
        for name, least, most in (
            ("max_batch_size", 0, 2**31), ("prefill_tokens", 0, 2**31),
            ("cache_tokens", 0, 2**40), ("threads", 0, 1024), ("block_size", 1, 2**20),
        ):  # fmt: skip
            if not least <= (value := getattr(self, name)) <= most:
                raise UserError(f"engine.{name} ({value}) must be from {least} to {most}")
        self._check_kernels()

    def _check_kernels(self) -> None:
        on_cpu = self.resolve_device().type == "cpu"
        if self.kernels in ("c", "torch") and not on_cpu:
            raise UserError(
                f"engine.kernels ({self.kernels}) is for engine.device cpu; set it to triton or "
                "auto"
            )
        if self.kernels == "triton" and on_cpu and os.environ.get("TRITON_INTERPRET") != "1":
            raise UserError(
                "engine.kernels (triton) needs a GPU; set it to auto (or, to test the kernels "
                "without one, set the environment variable TRITON_INTERPRET=1)"
            )
        if self.kernels == "triton" or not on_cpu:
            if importlib.util.find_spec("triton") is None:
                raise UserError("sampling on a GPU needs triton: pip install 'triton>=3.6'")
            if self.block_size < 8 or self.block_size & (self.block_size - 1):
                raise UserError(
                    f"engine.block_size ({self.block_size}) must be 8, 16, 32 or another power of "
                    "two on a GPU"
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

    def resolve_kernels(self) -> str:
        """Returns what `kernels` means here: c, torch or triton."""
        if self.kernels != "auto":
            return self.kernels
        if self.resolve_device().type != "cpu":
            return "triton"
        return "torch" if _reason_against_c(self.resolve_dtype()) else "c"

    def resolve_batch_invariant(self) -> bool:
        """Returns what `batch_invariant` means here."""
        if self.batch_invariant != "auto":
            return self.batch_invariant == "on"
        return self.resolve_device().type == "cpu"


@cache
def _reason_against_c(dtype: torch.dtype) -> str | None:
    """Returns why the C functions cannot be had here, None if they can; says so once."""
    try:
        cpu_compiled.library(dtype)
    except c_library.NoCompiler as error:
        logger.warning("sampling in torch alone, about half as fast as could be: %s", error)
        return str(error)
    return None


def _load_ops(engine: EngineParams) -> ModuleType:
    """Returns the module of operations; triton is only imported where it is used."""
    kernels = engine.resolve_kernels()
    if kernels == "triton":
        from restem_kernels import gpu

        return gpu
    if kernels == "c":
        if reason := _reason_against_c(engine.resolve_dtype()):
            raise UserError(f"engine.kernels is c, but {reason}; or set it to auto or torch")
        return cpu_compiled
    return cpu


def decode_rows(needed: int, *, num_lanes: int, full_passes: bool, few: bool) -> int:
    """Returns how many lanes a step computes where the first `needed` are in use.

    Args:
        needed: at least 1.
        num_lanes: the most, a multiple of ROW_STEP.
        full_passes: always the most.
        few: in steps of an eighth to a quarter, since each number is a captured graph.
    """
    if full_passes:
        return num_lanes
    step = ROW_STEP
    if few:
        step = max(ROW_STEP, 2 ** (max(needed - 1, 1).bit_length() - 3))
    return min(-(-needed // step) * step, num_lanes)


def prefill_rows(needed: int, *, prefill_tokens: int, full_passes: bool) -> int:
    """Returns how many rows a pass over prompts computes where it needs some."""
    if full_passes:
        return prefill_tokens
    return -(-max(needed, 1) // ROW_STEP) * ROW_STEP


class Sampler:
    """Draws completions from one policy."""

    def __init__(self, policy: str | Path | nn.Module, engine: EngineParams | None = None):
        """Loads the policy and allocates the KV cache.

        Args:
            policy: Hugging Face folder, or a module already behind our attention, whose linear
                layers are then joined and packed.
            engine: how to use the machine.
        """
        self.engine = engine = engine or EngineParams()
        self.dtype, self.device = engine.resolve_dtype(), engine.resolve_device()
        self.ops = _load_ops(engine)
        on_cpu = self.device.type == "cpu"
        if not on_cpu and self.device.index is not None:
            torch.cuda.set_device(self.device)
        self.module = policy
        if not isinstance(policy, nn.Module):
            self.module = load_module(policy, device=self.device, dtype=self.dtype)
        self.max_batch_size = engine.max_batch_size or (CPU_BATCH if on_cpu else CUDA_BATCH)
        self.num_lanes = -(-self.max_batch_size // ROW_STEP) * ROW_STEP
        prefill = engine.prefill_tokens or (CPU_PREFILL if on_cpu else CUDA_PREFILL)
        self.prefill_tokens = -(-prefill // ROW_STEP) * ROW_STEP
        config = self.module.config.get_text_config()
        self.context = getattr(config, "max_position_embeddings", 2**31)
        self.num_blocks = self._count_blocks()
        self.cache = make_cache(
            self.module, num_blocks=1 + self.num_blocks, block_size=engine.block_size
        )
        # No prompt with its completion is longer than the cache.
        num_positions = min(self.context, self.num_blocks * engine.block_size)
        self.model = make_model(self.module, self.ops, self.cache, num_positions=num_positions)
        self.full_passes = engine.resolve_batch_invariant() and not self._rows_are_independent()
        eos = self.module.generation_config.eos_token_id
        self.eos_ids = tuple([eos] if isinstance(eos, int) else eos or [])
        # The device need not wait for the host; on the CPU they are one.
        self.lag = 0 if on_cpu else CUDA_LAG
        self.num_preemptions = 0
        self._machinery: tuple[dict[str, float], Machinery] | None = None

    def _count_blocks(self) -> int:
        engine = self.engine
        tokens = engine.cache_tokens or CPU_CACHE_TOKENS
        if not engine.cache_tokens and self.device.type == "cuda":
            torch.cuda.empty_cache()
            num_bytes = int(torch.cuda.mem_get_info(self.device)[0] * CUDA_CACHE_SHARE)
            limits = {"num_lanes": self.num_lanes, "context": self.context}
            tokens = useful_tokens(self.module, num_bytes, **limits)
        return -(-tokens // engine.block_size)

    def _rows_are_independent(self) -> bool:
        """Returns whether a row of each product is the same bits for every number of rows.

        So it is with oneDNN's packed weights on the CPUs seen; on a GPU the library chooses
        another algorithm for another number of rows.
        """
        if self.device.type != "cpu":
            return False
        generator = torch.Generator().manual_seed(0)
        seen = set()
        for projection in self.model.projections:
            num_outputs, num_inputs = projection.weight.shape
            if (num_outputs, num_inputs) in seen:
                continue
            seen.add((num_outputs, num_inputs))
            x = torch.randn(self.num_lanes, num_inputs, generator=generator).to(self.dtype)
            with torch.inference_mode():
                whole = projection(x)
                for rows in (ROW_STEP, 3 * ROW_STEP):
                    if not torch.equal(projection(x[-rows:]), whole[-rows:]):
                        return False
        return True

    @torch.inference_mode()
    def _fastest_threads(self) -> int:
        """Returns one or all threads, by the time of a few products; bits do not depend on it."""
        most = torch.get_num_threads()
        projections = self.model.projections[:8]
        if most == 1 or not projections:
            return most
        inputs = [
            torch.ones(self.num_lanes, p.weight.shape[1], dtype=self.dtype) for p in projections
        ]
        seconds = {}
        for threads in (1, most):
            torch.set_num_threads(threads)
            times = []
            for _ in range(4):
                start = time.perf_counter()
                for projection, x in zip(projections, inputs, strict=True):
                    projection(x)
                times.append(time.perf_counter() - start)
            seconds[threads] = statistics.median(times)
        return min(seconds, key=seconds.get)

    def _prepare(self, params: SamplingParams) -> Machinery:
        """Returns lanes and graphs for these settings: those of the last run if it had the same."""
        settings = draw_settings(params) | {"max_new_tokens": params.max_new_tokens}
        if self._machinery is None or self._machinery[0] != settings:
            split = range_size(self.engine.block_size)
            lanes = Lanes(
                self.num_lanes,
                split=split,
                own_keys=params.max_new_tokens,
                block_size=self.engine.block_size,
                device=self.device,
            )
            step = make_step(self.ops, self.model, lanes, draw_settings(params))
            group = self.module.config.get_text_config().num_attention_heads
            group //= self.cache.head_shape[0]
            machinery = Machinery(
                ops=self.ops,
                model=self.model,
                cache=self.cache,
                lanes=lanes,
                graphs=StepGraphs(step, self.device),
                decode_rows=partial(
                    decode_rows,
                    num_lanes=self.num_lanes,
                    full_passes=self.full_passes,
                    few=self.device.type == "cuda",
                ),
                prefill_rows=partial(
                    prefill_rows,
                    prefill_tokens=self.prefill_tokens,
                    full_passes=self.full_passes,
                ),
                max_tile_rows=self.ops.tile_rows(group),
                lag=self.lag,
            )
            self._machinery = settings, machinery
        return self._machinery[1]

    def update_weights(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Copies live weights into the sampler's module, see `weights.update_weights`."""
        update_weights(self.module, named)
        self.model.pack()

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
        """Yields completions as they finish, in no fixed order; one run at a time.

        On the CPU torch's number of threads is that of the engine until the run is over.

        Args:
            requests: read as late as possible, so they may be claimed while sampling runs.
            params: how to draw; `n` is not looked at, the requests say which completions.
            seed: part of the address of every draw.
            iteration: part of the address of every draw.
            decode: token ids to text; needed for stop strings only.

        Raises:
            UserError: if the KV cache cannot hold one prompt with its completion, if these are
                longer than what the model takes, or if stop strings are given without decode.
        """
        if params.stop and decode is None:
            raise UserError(
                "sampling.stop needs text; give Sampler.generate the tokenizer's decode"
            )
        scheduler = Scheduler(
            requests,
            BlockPool(self.num_blocks),
            Limits(
                block_size=self.engine.block_size,
                num_lanes=self.max_batch_size,
                unused_table=self.num_lanes,
                prefill_tokens=self.prefill_tokens,
                max_new_tokens=params.max_new_tokens,
                context=self.context,
            ),
            key_of=lambda request_id: address_key(seed, iteration, request_id),
        )
        threads_before = torch.get_num_threads()
        if self.device.type == "cpu":
            torch.set_num_threads(self.engine.threads or self._fastest_threads())
        try:
            yield from Generation(
                self._prepare(params),
                scheduler,
                params,
                eos_ids=self.eos_ids,
                stop=StopStrings(params.stop, decode or (lambda ids: "")),
            )
        finally:
            torch.set_num_threads(threads_before)
        self.num_preemptions = scheduler.num_preemptions
