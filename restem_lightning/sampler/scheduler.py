"""Scheduler: which prompts are computed and which sequences run next. It sees no tensor."""

import heapq
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from restem_lightning.errors import UserError
from restem_lightning.sampler.blocks import BlockPool
from restem_lightning.sampler.params import Request
from restem_lightning.sampler.sequence import Segment, Sequence


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Sizes that the scheduler keeps to.

    Args:
        block_size: tokens in a cache block.
        num_lanes: sequences decoded together.
        unused_table: row of the block tables for rows of a batch that are unused; lanes have those
            before it, segments those behind it.
        prefill_tokens: tokens of prompts in one forward pass.
        max_new_tokens: longest completion.
        context: most tokens of a prompt and its completion that the model can take.
    """

    block_size: int
    num_lanes: int
    unused_table: int
    prefill_tokens: int
    max_new_tokens: int
    context: int

    @property
    def blocks_per_sequence(self) -> int:
        """Returns the blocks of the longest completion."""
        return -(-self.max_new_tokens // self.block_size)


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Tokens first .. last-1 of a segment, computed in one forward pass."""

    segment: Segment
    first: int
    last: int


class Scheduler:
    """Continuous batching: keeps the lanes full, and enough prompts computed to keep them so."""

    def __init__(
        self,
        requests: Iterable[Request],
        pool: BlockPool,
        limits: Limits,
        *,
        key_of: Callable[[str], tuple[int, int]],
    ):
        """Starts with nothing running.

        Args:
            requests: taken one at a time, as late as possible.
            pool: free cache blocks.
            limits: sizes to keep to.
            key_of: key words of a request's draws.
        """
        self.pool, self.limits, self.key_of = pool, limits, key_of
        self.requests = iter(requests)
        self.next_request: Request | None = next(self.requests, None)
        self.preambles: dict[tuple[int, ...], Segment] = {}
        self.prefilling: deque[tuple[Segment, Request]] = deque()
        self.ready: deque[Sequence] = deque()
        self.running: dict[Sequence, None] = {}  # in the order of their start
        self.free_lanes = list(range(limits.num_lanes))
        self.free_tables: list[int] = []
        self.num_tables = limits.unused_table + 1
        self.num_shared_blocks = 0
        self.num_preemptions = 0

    @property
    def done(self) -> bool:
        """Returns whether nothing is left to do."""
        return not (self.next_request or self.prefilling or self.ready or self.running)

    def admit(self) -> list[Sequence]:
        """Gives free lanes to waiting sequences and returns them.

        Those that were preempted get blocks for what they had in the cache; new ones have nothing
        there yet and need their first draw.
        """
        started = []
        while self.ready and self.free_lanes:
            sequence = self.ready[0]
            needed = -(-sequence.num_cached // self.limits.block_size)
            # Each running sequence may need a block soon; a single one always has enough.
            if self.running and self.pool.num_free - needed <= len(self.running):
                break
            self.ready.popleft()
            sequence.lane = heapq.heappop(self.free_lanes)
            sequence.blocks = [self.pool.allocate_private() for _ in range(needed)]
            self.running[sequence] = None
            started.append(sequence)
        return started

    def num_missing_blocks(self) -> int:
        """Returns how many blocks the running sequences need for their next token."""
        size = self.limits.block_size
        return sum(sequence.num_cached == len(sequence.blocks) * size for sequence in self.running)

    def grow(self) -> list[tuple[int, int, int]]:
        """Makes room for one more token of each running sequence; the pool must hold enough.

        Returns:
            (lane, place in its table, block) of each new block.
        """
        size, new = self.limits.block_size, []
        for sequence in self.running:
            if sequence.num_cached == len(sequence.blocks) * size:
                block = self.pool.allocate_private()
                new.append((sequence.lane, len(sequence.blocks), block))
                sequence.blocks.append(block)
            sequence.num_cached += 1
        return new

    def youngest(self) -> Sequence:
        """Returns the running sequence that started last: the one to preempt."""
        return next(reversed(self.running))

    def preempt(self, sequence: Sequence) -> None:
        """Takes lane and blocks from a sequence, whose keys and values must have been saved."""
        self.num_preemptions += 1
        self._stop_running(sequence)
        self.ready.appendleft(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Takes a running sequence out and frees what only it needed."""
        self._stop_running(sequence)
        self._leave(sequence.prompt)

    def compact(self, num_lanes: int) -> list[tuple[int, int]]:
        """Moves running sequences to the first num_lanes lanes; returns the (from, to) pairs."""
        moves = []
        for sequence in self.running:
            if sequence.lane >= num_lanes:
                lane = heapq.heappop(self.free_lanes)
                heapq.heappush(self.free_lanes, sequence.lane)
                moves.append((sequence.lane, lane))
                sequence.lane = lane
        return moves

    def plan_prefill(self) -> list[Chunk]:
        """Returns the parts of prompts to compute next: none while enough sequences wait.

        It waits until a pass is worth it, then fills the pass.
        """
        limits, chunks = self.limits, []
        if len(self.ready) >= max(len(self.free_lanes), limits.num_lanes // 2, 1):
            return chunks
        budget = limits.prefill_tokens
        while budget:
            segment = self._unfinished()
            if segment is None:
                coming = sum(len(request.indices) for _, request in self.prefilling)
                if len(self.ready) + coming >= limits.num_lanes or not self._open_next():
                    break
                continue
            first = segment.num_scheduled
            last = min(first + budget, len(segment.token_ids))
            chunks.append(Chunk(segment=segment, first=first, last=last))
            segment.num_scheduled = last
            budget -= last - first
        return chunks

    def complete_prefill(self) -> list[Segment]:
        """Returns the prompts that are now computed whole; their sequences become ready."""
        finished = []
        while self.prefilling:
            prompt, request = self.prefilling[0]
            if prompt.num_scheduled < len(prompt.token_ids):
                break
            self.prefilling.popleft()
            key = self.key_of(request.request_id)
            self.ready.extend(
                Sequence(request_id=request.request_id, index=index, key=key, prompt=prompt)
                for index in request.indices
            )
            finished.append(prompt)
        return finished

    def _stop_running(self, sequence: Sequence) -> None:
        del self.running[sequence]
        heapq.heappush(self.free_lanes, sequence.lane)
        self.pool.release(sequence.blocks)
        sequence.lane, sequence.blocks = -1, []

    def _unfinished(self) -> Segment | None:
        """Returns the first segment that is not scheduled to its end."""
        for prompt, _ in self.prefilling:
            if prompt.num_scheduled < len(prompt.token_ids):
                return next(s for s in prompt.chain if s.num_scheduled < len(s.token_ids))
        return None

    def _open_next(self) -> bool:
        """Takes the next request and gives its prompt blocks; False if none is left or none fit."""
        request = self.next_request
        if request is None:
            return False
        self._check_context(request)
        # The last token is never shared: its logits are the start of the completions.
        num_shared = min(request.num_shared, len(request.prompt_ids) - 1)
        shared, rest = request.prompt_ids[:num_shared], request.prompt_ids[num_shared:]
        if not self._make_room(request, shared, rest):
            return False
        parent = self.preambles.get(shared)
        if parent is None and shared:
            parent = self.preambles[shared] = self._open(shared, None)
            parent.is_preamble = True
        prompt = self._open(rest, parent)
        prompt.num_users = len(request.indices)
        if parent:
            parent.num_users += 1
        self.prefilling.append((prompt, request))
        self.next_request = next(self.requests, None)
        return True

    def _check_context(self, request: Request) -> None:
        limits = self.limits
        total = len(request.prompt_ids) + limits.max_new_tokens
        if total > limits.context:
            most = limits.context - len(request.prompt_ids)
            remedy = f"lower it to {most} or leave" if most > 0 else "leave"
            raise UserError(
                f"sampling.max_new_tokens ({limits.max_new_tokens}) and the "
                f"{len(request.prompt_ids)} prompt tokens of {request.request_id} are {total} "
                f"tokens, more than the {limits.context} that this model takes; {remedy} the "
                "problem out"
            )

    def _make_room(self, request: Request, shared: tuple[int, ...], rest: tuple[int, ...]) -> bool:
        """Returns whether a prompt fits beside a whole completion, dropping preambles if need be.

        Raises:
            UserError: if it never will.
        """
        pool, reserve = self.pool, self.limits.blocks_per_sequence

        def fits() -> bool:
            known = not shared or shared in self.preambles
            needed = self._num_blocks(rest) + (0 if known else self._num_blocks(shared))
            left = pool.num_blocks - self.num_shared_blocks - needed
            return needed <= pool.num_free and left >= reserve

        for tokens, preamble in list(self.preambles.items()):
            if fits():
                break
            if preamble.num_users == 0 and tokens != shared:
                del self.preambles[tokens]
                self._close(preamble)
        if fits():
            return True
        if not (self.running or self.ready or self.prefilling):
            size = self.limits.block_size
            raise UserError(
                f"engine.cache_tokens ({pool.num_blocks * size}) must hold a completion of "
                f"{request.request_id}: {len(request.prompt_ids)} prompt tokens and "
                f"{reserve * size} new ones; raise it"
            )
        return False

    def _num_blocks(self, token_ids: tuple[int, ...]) -> int:
        return -(-len(token_ids) // self.limits.block_size)

    def _open(self, token_ids: tuple[int, ...], parent: Segment | None) -> Segment:
        segment = Segment(token_ids=token_ids, parent=parent)
        segment.blocks = self.pool.allocate_shared(self._num_blocks(token_ids))
        self.num_shared_blocks += len(segment.blocks)
        if self.free_tables:
            segment.table = self.free_tables.pop()
        else:
            segment.table, self.num_tables = self.num_tables, self.num_tables + 1
        return segment

    def _close(self, segment: Segment) -> None:
        self.pool.release(segment.blocks)
        self.num_shared_blocks -= len(segment.blocks)
        self.free_tables.append(segment.table)

    def _leave(self, prompt: Segment) -> None:
        prompt.num_users -= 1
        if prompt.num_users == 0:
            self._close(prompt)
            if prompt.parent:
                prompt.parent.num_users -= 1
