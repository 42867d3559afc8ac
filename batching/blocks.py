"""Paged KV accounting (Kwon et al. 2023, section 4): which blocks are free, which request holds which.

Only numbers of blocks live here; the tensors they stand for belong to `model/kv_cache.py`.
"""

from collections import deque
from collections.abc import Sequence


def blocks_for(tokens: int, block_size: int) -> int:
    """Blocks needed for `tokens` KV columns."""
    return -(-tokens // block_size)


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens. Allocated + free = total, always."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a block pool needs at least one block of one token, not {num_blocks} of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = deque(range(num_blocks))
        self._held = bytearray(num_blocks)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks off the head of the free list. Raises ValueError if there are fewer."""
        if count > len(self._free):
            raise ValueError(f"{count} blocks asked for, {len(self._free)} are free")
        taken = [self._free.popleft() for _ in range(count)]
        for block in taken:
            self._held[block] = 1
        return taken

    def free(self, blocks: Sequence[int]) -> None:
        """Give blocks back, the end of the sequence first. Raises ValueError for one that is not held."""
        for block in reversed(blocks):
            if not self._held[block]:
                raise ValueError(f"block {block} freed twice")
            self._held[block] = 0
            self._free.append(block)
