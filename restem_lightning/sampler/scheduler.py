"""Scheduler: which tokens go through the model next, within the token budget. It sees no tensor."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from restem_lightning.errors import UserError
from restem_lightning.sampler.blocks import BlockPool
from restem_lightning.sampler.params import Request
from restem_lightning.sampler.sequence import Segment, Sequence


@dataclass(kw_only=True)
class Step:
    """What one forward pass computes.

    Args:
        decode: (sequence, first, last): its own tokens first .. last-1; more than one only after a
            preemption, when their keys and values are computed again.
        prefill: (segment, block): the tokens of that block of the segment.
    """

    decode: list[tuple[Sequence, int, int]] = field(default_factory=list)
    prefill: list[tuple[Segment, int]] = field(default_factory=list)


class Scheduler:
    """Continuous batching: running sequences first, prompts of the next in the rows left over."""

    def __init__(
        self,
        requests: Iterable[Request],
        pool: BlockPool,
        *,
        block_size: int,
        max_batch_size: int,
        max_batch_tokens: int,
        max_new_tokens: int,
        key_of: Callable[[str], tuple[int, int]],
    ):
        """Starts with nothing running.

        Args:
            requests: taken one at a time, as late as possible.
            pool: free cache blocks.
            block_size: tokens in a block.
            max_batch_size: sequences decoded together.
            max_batch_tokens: tokens in one forward pass, at least max_batch_size.
            max_new_tokens: longest completion.
            key_of: key words of a request's draws.
        """
        self.pool, self.block_size, self.key_of = pool, block_size, key_of
        self.max_batch_size, self.max_batch_tokens = max_batch_size, max_batch_tokens
        self.blocks_per_sequence = -(-max_new_tokens // block_size)
        self.requests = iter(requests)
        self.next_request: Request | None = next(self.requests, None)
        self.preambles: dict[tuple[int, ...], Segment] = {}
        self.prefilling: deque[tuple[Segment, Request]] = deque()
        self.ready: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_shared_blocks = 0
        self.num_preemptions = 0

    @property
    def done(self) -> bool:
        """Returns whether nothing is left to do."""
        return not (self.next_request or self.prefilling or self.ready or self.running)

    def admit(self) -> Iterator[Sequence]:
        """Yields the sequences that start now; those without tokens need their first draw."""
        while self.ready and len(self.running) < self.max_batch_size:
            if self.pool.num_free <= len(self.running):
                return
            sequence = self.ready.popleft()
            self.running.append(sequence)
            yield sequence

    def plan(self) -> Step:
        """Returns the next step and allocates the blocks that it writes to."""
        step, budget = Step(), self.max_batch_tokens
        for position, sequence in enumerate(list(self.running)):
            # Preemption takes from the end of the list, so nothing that is planned goes.
            if position >= len(self.running) or budget == 0:
                break
            first = sequence.num_cached
            last = min(len(sequence.token_ids), first + budget)
            if self._grow(sequence, last):
                step.decode.append((sequence, first, last))
                budget -= last - first
        self._fill_with_prompts(step, budget)
        return step

    def finish(self, sequence: Sequence) -> None:
        """Takes a finished sequence out and frees what only it needed."""
        self.running.remove(sequence)
        self.pool.release(sequence.blocks)
        self._leave(sequence.prompt)

    def complete(self, step: Step) -> Iterator[Segment]:
        """Yields the prompts whose last token was in the step; their sequences become ready."""
        for sequence, _, last in step.decode:
            sequence.num_cached = last
        while self.prefilling:
            prompt, request = self.prefilling[0]
            if prompt.num_scheduled < len(prompt.token_ids):
                return
            self.prefilling.popleft()
            key = self.key_of(request.request_id)
            for index in request.indices:
                self.ready.append(
                    Sequence(request_id=request.request_id, index=index, key=key, prompt=prompt)
                )
            yield prompt

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Gives a sequence blocks for num_tokens, preempting the youngest; False if that is it."""
        while len(sequence.blocks) * self.block_size < num_tokens:
            if self.pool.num_free == 0:
                youngest = self.running.pop()
                self._preempt(youngest)
                if youngest is sequence:
                    return False
            else:
                sequence.blocks.append(self.pool.allocate_private())
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Takes a sequence's blocks away; its tokens stay and are computed again later."""
        self.num_preemptions += 1
        self.pool.release(sequence.blocks)
        sequence.blocks, sequence.num_cached = [], 0
        self.ready.appendleft(sequence)

    def _fill_with_prompts(self, step: Step, budget: int) -> None:
        """Adds blocks of prompts in order until the budget is used or enough prompts are ready."""
        while budget >= self.block_size:
            unfinished = [s for s, _ in self.prefilling if s.num_scheduled < len(s.token_ids)]
            if not unfinished:
                if len(self.ready) >= self.max_batch_size or not self._open_next():
                    return
                continue
            segment = next(s for s in unfinished[0].chain if s.num_scheduled < len(s.token_ids))
            step.prefill.append((segment, segment.num_scheduled // self.block_size))
            segment.num_scheduled = min(
                segment.num_scheduled + self.block_size, len(segment.token_ids)
            )
            budget -= self.block_size

    def _open_next(self) -> bool:
        """Takes the next request and gives its prompt blocks; False if none is left or none fit."""
        request = self.next_request
        if request is None:
            return False
        # The last token is never shared: its logits are the start of the completions.
        num_shared = min(request.num_shared, len(request.prompt_ids) - 1)
        shared, rest = request.prompt_ids[:num_shared], request.prompt_ids[num_shared:]
        parent = self.preambles.get(shared)
        needed = self._num_blocks(rest) + (0 if parent else self._num_blocks(shared))
        reserve = self.blocks_per_sequence
        if self.pool.num_free < needed or (
            self.pool.num_blocks - self.num_shared_blocks - needed < reserve
        ):
            if not (self.running or self.ready or self.prefilling):
                raise UserError(
                    f"engine.cache_tokens ({self.pool.num_blocks * self.block_size}) must hold a "
                    f"completion of {request.request_id}: {len(request.prompt_ids)} prompt tokens "
                    f"and {reserve * self.block_size} new ones; raise it"
                )
            return False
        if parent is None and shared:
            parent = Segment(token_ids=shared, is_preamble=True)
            parent.blocks = self._share(len(shared))
            self.preambles[shared] = parent
        prompt = Segment(token_ids=rest, parent=parent)
        prompt.num_users = len(request.indices)
        prompt.blocks = self._share(len(prompt.token_ids))
        self.prefilling.append((prompt, request))
        self.next_request = next(self.requests, None)
        return True

    def _num_blocks(self, token_ids: tuple[int, ...]) -> int:
        return -(-len(token_ids) // self.block_size)

    def _share(self, num_tokens: int) -> list[int]:
        blocks = self.pool.allocate_shared(-(-num_tokens // self.block_size))
        self.num_shared_blocks += len(blocks)
        return blocks

    def _leave(self, segment: Segment) -> None:
        segment.num_users -= 1
        if segment.num_users == 0:
            self.pool.release(segment.blocks)
            self.num_shared_blocks -= len(segment.blocks)
