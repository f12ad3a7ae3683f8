"""One run of the sampler: prompts in, decode steps, completions out.

On a GPU the host stays some steps behind: it launches a step, then reads the tokens of one before.
A sequence that has ended is noticed that many steps late; what they drew for it is dropped.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from types import ModuleType

import torch
from torch import Tensor

from restem_lightning.sampler.batch import TileList, prefill_batch, shared_tiles
from restem_lightning.sampler.fused import FusedModel
from restem_lightning.sampler.kv_cache import KVCache
from restem_lightning.sampler.lanes import Lanes
from restem_lightning.sampler.params import Sample, SamplingParams
from restem_lightning.sampler.runner import PlainModel, StepGraphs
from restem_lightning.sampler.scheduler import Scheduler
from restem_lightning.sampler.sequence import Sequence
from restem_lightning.sampler.stop import StopStrings


@dataclass(frozen=True, kw_only=True)
class Machinery:
    """What a sampler keeps from one run to the next.

    Args:
        ops: `restem_kernels.cpu`, `cpu_compiled` or `gpu`.
        model: computes logits.
        cache: keys and values.
        lanes: device state of the running sequences.
        graphs: the decode step of the first n lanes.
        decode_rows: lanes to compute for how many are needed.
        prefill_rows: rows of a pass over prompts for how many are needed.
        max_tile_rows: rows of a tile over a shared segment.
        lag: steps that the host stays behind the device.
    """

    ops: ModuleType
    model: FusedModel | PlainModel
    cache: KVCache
    lanes: Lanes
    graphs: StepGraphs
    decode_rows: Callable[[int], int]
    prefill_rows: Callable[[int], int]
    max_tile_rows: int
    lag: int


def draw_settings(params: SamplingParams) -> dict[str, float]:
    """Returns the settings of `sample_tokens`."""
    names = ("temperature", "top_k", "top_p", "min_p")
    return {name: getattr(params, name) for name in names}


def pack(tokens: Tensor, logprobs: Tensor, sampling_logprobs: Tensor) -> Tensor:
    """Returns draws as [3, n] int32, so that one copy brings them to the host."""
    return torch.stack(
        [tokens.int(), logprobs.view(torch.int32), sampling_logprobs.view(torch.int32)]
    )


def make_step(
    ops: ModuleType, model: FusedModel | PlainModel, lanes: Lanes, settings: dict[str, float]
) -> Callable[[int], Tensor]:
    """Returns the decode step of the first n lanes: one more token each, packed draws [3, n]."""

    def step(num_rows: int) -> Tensor:
        logits = model(lanes.tokens[:num_rows], lanes.work(num_rows), None)
        drawn = ops.sample_tokens(
            logits,
            lanes.keys[:num_rows],
            lanes.completion_index[:num_rows],
            lanes.draw_positions[:num_rows],
            **settings,
        )
        lanes.advance(drawn[0])
        return pack(*drawn)

    return step


class _Draws:
    """Packed draws on their way to the host."""

    def __init__(self, sequences: list[Sequence], columns: list[int] | None, packed: Tensor):
        self.sequences, self.columns, self.event = sequences, columns, None
        self.packed = packed
        if packed.device.type == "cuda":
            self.packed = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            self.packed.copy_(packed, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def read(self) -> Iterator[tuple[Sequence, int, float, float]]:
        """Yields each sequence with its token and two log-probabilities, once they are here."""
        if self.event is not None:
            self.event.synchronize()
        tokens = self.packed[0].tolist()
        logprobs, sampling_logprobs = self.packed[1:].view(torch.float32).tolist()
        columns = self.columns if self.columns is not None else range(len(self.sequences))
        for sequence, column in zip(self.sequences, columns, strict=True):
            yield sequence, tokens[column], logprobs[column], sampling_logprobs[column]


class Generation:
    """Draws all completions of a scheduler's requests."""

    def __init__(
        self,
        machinery: Machinery,
        scheduler: Scheduler,
        params: SamplingParams,
        *,
        eos_ids: tuple[int, ...],
        stop: StopStrings,
    ):
        """Starts with every lane unused.

        Args:
            machinery: of the sampler.
            scheduler: of the requests.
            params: how to draw.
            eos_ids: tokens that end a completion.
            stop: strings that end one.
        """
        self.machinery, self.scheduler, self.params = machinery, scheduler, params
        self.eos_ids, self.stop = frozenset(eos_ids), stop
        self.settings = draw_settings(params)
        self.pending: deque[_Draws] = deque()
        self.lanes_in_use: set[int] = set()  # on the device
        self.changed = True  # whether other sequences run than in the step before
        machinery.lanes.clear(list(range(machinery.lanes.num_lanes)))

    def __iter__(self) -> Iterator[Sample]:
        """Yields completions as they end."""
        scheduler = self.scheduler
        while not scheduler.done or self.pending:
            self._start(scheduler.admit())
            self._prefill()
            yield from self._make_room()
            self._decode()
            while len(self.pending) > (self.machinery.lag if scheduler.running else 0):
                yield from self._read(self.pending.popleft())

    def _tiles(self) -> TileList:
        return TileList(size=self.machinery.lanes.split, max_rows=self.machinery.max_tile_rows)

    @torch.inference_mode()  # as all that writes to the lanes' tensors: some are made there anew
    def _start(self, started: list[Sequence]) -> None:
        """Fills lanes; sequences that have no token yet get their first draw."""
        if not started:
            return
        self.changed = True
        lanes, tiles = self.machinery.lanes, self._tiles()
        num_shared = [tiles.num_before(s.prompt) + tiles.num_ranges(s.prompt) for s in started]
        lanes.reserve_pieces(max(num_shared))
        for sequence in started:
            if sequence.saved is not None:
                self.machinery.cache.restore(sequence.saved, sequence.blocks)
                sequence.saved = None
                lanes.set_blocks([(sequence.lane, *entry) for entry in enumerate(sequence.blocks)])
        index = lanes.place(started, num_shared)
        self.lanes_in_use.update(sequence.lane for sequence in started)
        place = 0
        for prompt, group in groupby(started, key=lambda s: None if s.num_drawn else s.prompt):
            sequences = list(group)
            part = index[place : place + len(sequences)]
            place += len(sequences)
            if prompt is not None:
                self._draw_first(prompt.logits, sequences, part)

    def _draw_first(self, logits: Tensor, sequences: list[Sequence], index: Tensor) -> None:
        lanes = self.machinery.lanes
        drawn = self.machinery.ops.sample_tokens(
            logits.expand(len(sequences), -1),
            lanes.keys[index],
            lanes.completion_index[index],
            torch.zeros_like(index),
            **self.settings,
        )
        lanes.tokens[index] = drawn[0]
        self._drawn(_Draws(sequences, None, pack(*drawn)))

    def _drawn(self, draws: _Draws) -> None:
        """Counts one more draw of each sequence; those that may have no more leave their lanes."""
        self.pending.append(draws)
        for sequence in draws.sequences:
            sequence.num_drawn += 1
            if sequence.num_drawn == self.params.max_new_tokens:
                self._leave_lane(sequence)

    def _leave_lane(self, sequence: Sequence) -> None:
        self.changed = True
        self.scheduler.finish(sequence)

    @torch.inference_mode()
    def _prefill(self) -> None:
        """Computes parts of prompts, if the scheduler wants any."""
        chunks = self.scheduler.plan_prefill()
        if not chunks:
            return
        lanes = self.machinery.lanes
        opened = [chunk.segment for chunk in chunks if chunk.first == 0]
        entries = [(s.table, place, block) for s in opened for place, block in enumerate(s.blocks)]
        lanes.set_blocks(entries)
        batch = prefill_batch(
            chunks,
            self._tiles(),
            tables=lanes.tables,
            unused_table=lanes.unused_table,
            num_rows=self.machinery.prefill_rows,
            to_device=lanes.to_device,
        )
        logits = self.machinery.model(batch.token_ids, batch.work, batch.logit_rows)
        for row, prompt in enumerate(batch.prompts):
            prompt.logits = logits[row].clone()
        self.scheduler.complete_prefill()

    def _make_room(self) -> Iterator[Sample]:
        """Preempts the youngest sequences until every other one can have one more token."""
        scheduler = self.scheduler
        while scheduler.num_missing_blocks() > scheduler.pool.num_free:
            # The host must know the tokens of what it takes off the device.
            while self.pending:
                yield from self._read(self.pending.popleft())
            if scheduler.num_missing_blocks() > scheduler.pool.num_free:
                youngest = scheduler.youngest()
                youngest.saved = self.machinery.cache.save(youngest.blocks)
                scheduler.preempt(youngest)
                self.changed = True

    @torch.inference_mode()
    def _decode(self) -> None:
        """Launches one step of all running sequences."""
        scheduler, machinery = self.scheduler, self.machinery
        if not scheduler.running:
            return
        lanes = machinery.lanes
        lanes.set_blocks(scheduler.grow())
        if self.changed:
            self._update_lanes()
        sequences = list(scheduler.running)
        columns = [sequence.lane for sequence in sequences]
        machinery.graphs.keep_for(lanes.generation)
        packed = machinery.graphs(machinery.decode_rows(max(columns) + 1))
        self._drawn(_Draws(sequences, columns, packed))

    def _update_lanes(self) -> None:
        """Brings the device's lanes up to date after sequences have started or left."""
        scheduler, lanes = self.scheduler, self.machinery.lanes
        gone = self.lanes_in_use - {sequence.lane for sequence in scheduler.running}
        if gone:
            lanes.clear(sorted(gone))
        rows = self.machinery.decode_rows(len(scheduler.running))
        moves = scheduler.compact(rows)
        if moves:
            lanes.move(moves)
        self.lanes_in_use = {sequence.lane for sequence in scheduler.running}
        lanes.set_tiles(shared_tiles(scheduler.running, self._tiles()))
        self.changed = False

    def _read(self, draws: _Draws) -> Iterator[Sample]:
        """Takes draws that have reached the host and yields the completions that they end."""
        for sequence, token, logprob, sampling_logprob in draws.read():
            if sequence.ended:
                continue
            sequence.token_ids.append(token)
            sequence.logprobs.append(logprob)
            sequence.sampling_logprobs.append(sampling_logprob)
            length, num_beyond = len(sequence.token_ids), 0
            if token in self.eos_ids:
                reason = "eos"
            elif (cut := self.stop.cut(sequence.token_ids)) is not None:
                reason, (length, num_beyond) = "stop", cut
            elif length == self.params.max_new_tokens:
                reason = "length"
            else:
                continue
            sequence.ended = True
            if sequence.lane >= 0:
                self._leave_lane(sequence)
            yield _sample(sequence, length, reason, num_beyond)


def _sample(sequence: Sequence, length: int, reason: str, num_beyond: int) -> Sample:
    return Sample(
        request_id=sequence.request_id,
        index=sequence.index,
        token_ids=tuple(sequence.token_ids[:length]),
        logprobs=tuple(sequence.logprobs[:length]),
        sampling_logprobs=tuple(sequence.sampling_logprobs[:length]),
        finish_reason=reason,
        num_beyond=num_beyond,
    )
