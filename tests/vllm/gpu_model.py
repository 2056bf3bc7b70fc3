"""A model of vLLM's own prefix cache for one request at a time and one full-attention group.

Blocks stand in one queue of free blocks. A request takes the blocks it hits out of the queue and all others from its
front, which evicts what they held. At its end the blocks without a key go to the front, the others, last block first,
to the back.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class PrefixCache:
    """The cache. Block 0 is vLLM's null block and never used."""

    blocks: int
    queue: list[int] = field(default_factory=list)
    key_of: dict[int, str] = field(default_factory=dict)
    # Blocks that hold a key, oldest first: the same content may have been computed twice.
    holders: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """All blocks are free and empty."""
        self.queue = list(range(1, self.blocks))

    def match(self, keys: Sequence[str], limit: int) -> int:
        """Blocks of the longest prefix of `keys` that is here, at most `limit`."""
        found = 0
        while found < min(limit, len(keys)) and self.holders.get(keys[found]):
            found += 1
        return found

    def run(self, keys: Sequence[str], hit: int, blocks: int) -> None:
        """One request from its admission to its end.

        Args:
            keys: of all full blocks it computed, hit or loaded.
            hit: blocks it found here.
            blocks: blocks it used in all; those behind `keys` were never filled.

        """
        table = [self.holders[key][0] for key in keys[:hit]]
        for block in table:
            self.queue.remove(block)
        table += self._take(blocks - hit)
        for block, key in zip(table[hit:], keys[hit:], strict=False):
            self.key_of[block] = key
            self.holders.setdefault(key, []).append(block)
        empty = [block for block in reversed(table) if block not in self.key_of]
        full = [block for block in reversed(table) if block in self.key_of]
        self.queue = empty + self.queue + full

    def reset(self) -> None:
        """Forgets all keys; the queue keeps its order."""
        self.key_of.clear()
        self.holders.clear()

    def _take(self, count: int) -> list[int]:
        taken, self.queue = self.queue[:count], self.queue[count:]
        assert len(taken) == count, "the model was asked for more blocks than the cache has"
        for block in taken:
            key = self.key_of.pop(block, None)
            if key is not None:
                self.holders[key].remove(block)
        return taken
