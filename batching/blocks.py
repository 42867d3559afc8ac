"""Paged KV accounting (Kwon et al. 2023, section 4): which blocks are free, which requests hold which, and, for prefix caching
(vLLM's design note), what a block holds.

Only numbers of blocks and keys live here: the tensors belong to `model/kv_cache.py`, and whose tokens a key stands for is not
known. A full block may be shared, since nobody writes to it again. It keeps its key when it is freed, until it is handed out.
"""

from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b


def blocks_for(tokens: int, block_size: int) -> int:
    """Blocks needed for `tokens` KV columns."""
    return -(-tokens // block_size)


def chain(keys: list[bytes], tokens: Sequence[int], block_size: int) -> list[bytes]:
    """Continue `keys`, those of the first full blocks of `tokens`, to all of its full blocks. Returns `keys`.

    A block's key is a hash of the key before it and of its own tokens, so that it stands for everything up to its end.
    """
    for begin in range(len(keys) * block_size, len(tokens) - block_size + 1, block_size):
        parent = keys[-1] if keys else b""
        keys.append(blake2b(parent + array("i", tokens[begin : begin + block_size]).tobytes(), digest_size=16).digest())
    return keys


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens. A block with no reference is free; allocated + free = total, always."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a block pool needs at least one block of one token, not {num_blocks} of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = OrderedDict.fromkeys(range(num_blocks))  # the least recently used first
        self._references = array("i", [0]) * num_blocks
        self._keys: dict[int, bytes] = {}  # by block
        self._holding: dict[bytes, int] = {}  # blocks, by their key

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out, those that still hold a prefix included."""
        return len(self._free)

    def references(self, block: int) -> int:
        """How many requests hold `block`."""
        return self._references[block]

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks off the head of the free list; what they held is forgotten. Raises ValueError if there are
        fewer."""
        if count > len(self._free):
            raise ValueError(f"{count} blocks asked for, {len(self._free)} are free")
        taken = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in taken:
            self._references[block] = 1
            if key := self._keys.pop(block, None):
                del self._holding[key]
        return taken

    def free(self, blocks: Sequence[int]) -> None:
        """Give up a reference to each, the end of the sequence first: it is then also evicted first, and the beginning, which
        more requests have in common, last. Raises ValueError for a block that is not held."""
        for block in reversed(blocks):
            if not self._references[block]:
                raise ValueError(f"block {block} freed twice")
            self._references[block] -= 1
            if not self._references[block]:
                self._free[block] = None

    # Prefix caching.

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks that hold the longest known beginning of a chain of keys."""
        found = []
        for key in keys:
            block = self._holding.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def share(self, blocks: Iterable[int]) -> None:
        """Take one more reference to each of these blocks, as `find` gave them; a free one leaves the free list."""
        for block in blocks:
            if not self._references[block]:
                del self._free[block]
            self._references[block] += 1

    def enter(self, key: bytes, block: int) -> None:
        """`block`, which is held, is computed and full: from now on it can be found. The first with a key keeps it."""
        if key not in self._holding:
            self._holding[key] = block
            self._keys[block] = key

    def forget(self) -> None:
        """Let nothing be found any more."""
        self._keys.clear()
        self._holding.clear()


class References:
    """How many requests would hold each block after what a plan takes and gives back; the pool itself stays as it is."""

    def __init__(self, now: Callable[[int], int]) -> None:
        self._now = now
        self._change: dict[int, int] = {}

    def of(self, block: int) -> int:
        return self._now(block) + self._change.get(block, 0)

    def take(self, blocks: Iterable[int]) -> int:
        """One reference more to each. Returns how many were free."""
        were_free = 0
        for block in blocks:
            were_free += not self.of(block)
            self._change[block] = self._change.get(block, 0) + 1
        return were_free

    def give(self, blocks: Iterable[int]) -> int:
        """One reference less to each. Returns how many are free now."""
        are_free = 0
        for block in blocks:
            self._change[block] = self._change.get(block, 0) - 1
            are_free += not self.of(block)
        return are_free
