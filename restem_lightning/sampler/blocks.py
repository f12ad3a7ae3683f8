"""BlockPool: which blocks of the KV cache are free."""

import heapq


class BlockPool:
    """Hands out cache blocks 1 .. num_blocks: private ones from the low end, shared from the high.

    Block 0 is nobody's: unused rows of a batch write to it. Keeping the private blocks together
    lets the attention on the CPU read them in place, without a gather.
    """

    def __init__(self, num_blocks: int):
        """Starts with every block free.

        Args:
            num_blocks: blocks to hand out.
        """
        self.num_blocks = num_blocks
        self._low = list(range(1, num_blocks + 1))
        self._high = [-block for block in reversed(self._low)]
        self._free = set(self._low)

    @property
    def num_free(self) -> int:
        """Returns the number of free blocks."""
        return len(self._free)

    def allocate_private(self) -> int:
        """Returns the lowest free block and takes it."""
        while (block := heapq.heappop(self._low)) not in self._free:
            pass
        self._free.remove(block)
        return block

    def allocate_shared(self, num: int) -> list[int]:
        """Returns the num highest free blocks and takes them."""
        taken = []
        for _ in range(num):
            while (block := -heapq.heappop(self._high)) not in self._free:
                pass
            self._free.remove(block)
            taken.append(block)
        return taken

    def release(self, blocks: list[int]) -> None:
        """Makes blocks free again."""
        for block in blocks:
            assert block not in self._free
            self._free.add(block)
            heapq.heappush(self._low, block)
            heapq.heappush(self._high, -block)
