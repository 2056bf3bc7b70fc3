"""The prefix cache of a fake engine: blocks in a chain of hashes, evicted by age, and the events that tell of them."""

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Event = dict[str, Any]


@dataclass
class Lease:
    """Blocks that a running request holds, from the first on. They are not evicted before it ends."""

    blocks: list[int]
    cached_tokens: int


@dataclass
class PrefixCache:
    """So many blocks of so many tokens. What changed since the last look waits in `events`."""

    capacity: int
    block_tokens: int
    # Where events say that a block lies: an engine with a host tier has a copy of each block there.
    media: tuple[str, ...] = ("GPU",)
    events: list[Event] = field(default_factory=list)
    # The oldest first. Of one prompt the last block is the oldest, so a prefix outlives what
    # follows it.
    _ages: OrderedDict[int, None] = field(default_factory=OrderedDict)
    _leased: Counter[int] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self._ages)

    @property
    def usage(self) -> float:
        """Share of the blocks that running requests hold, as vLLM counts it."""
        return len(self._leased) / self.capacity

    def hashes(self, tokens: Sequence[int]) -> list[int]:
        """The chain of all full blocks."""
        found, parent = [], b""
        size = self.block_tokens
        for start in range(0, len(tokens) // size * size, size):
            words = array("I", tokens[start : start + size]).tobytes()
            parent = hashlib.blake2b(parent + words, digest_size=8).digest()
            found.append(int.from_bytes(parent, "big"))
        return found

    def held(self, tokens: Sequence[int]) -> int:
        """Leading tokens that need not be computed. The last token of a prompt always is."""
        count = 0
        for block in self.hashes(tokens[:-1]):
            if block not in self._ages:
                break
            count += self.block_tokens
        return count

    def begin(self, tokens: Sequence[int]) -> Lease:
        """A request begins: its blocks are held or computed, as far as there is room."""
        lease = Lease([], self.held(tokens))
        self.extend(lease, tokens)
        return lease

    def extend(self, lease: Lease, tokens: Sequence[int]) -> None:
        """A request's text, whose beginning it holds, has become so long."""
        chain = self.hashes(tokens)
        old = len(lease.blocks)
        fresh_from = None
        for at in range(old, len(chain)):
            if chain[at] not in self._ages:
                if not self._make_room():
                    break
                fresh_from = at if fresh_from is None else fresh_from
                self._ages[chain[at]] = None
            lease.blocks.append(chain[at])
            self._leased[chain[at]] += 1
        if fresh_from is not None:
            self._tell_stored(chain[: len(lease.blocks)], fresh_from, tokens)

    def end(self, lease: Lease) -> None:
        """A request has ended, however."""
        for block in reversed(lease.blocks):
            self._leased[block] -= 1
            if self._leased[block] <= 0:
                del self._leased[block]
            if block in self._ages:
                self._ages.move_to_end(block)
        lease.blocks.clear()

    def clear(self) -> None:
        """Forgets everything that nobody holds; vLLM refuses to while somebody does, so only then is it all."""
        if not self._leased:
            self._ages.clear()
            self.events.append({"type": "AllBlocksCleared"})

    def take_events(self) -> list[Event]:
        """What has changed."""
        events, self.events = self.events, []
        return events

    def _make_room(self) -> bool:
        if len(self._ages) < self.capacity:
            return True
        oldest = next((block for block in self._ages if block not in self._leased), None)
        if oldest is None:
            return False
        del self._ages[oldest]
        removed = {"type": "BlockRemoved", "block_hashes": [oldest], "group_idx": 0}
        self.events.extend({**removed, "medium": medium} for medium in self.media)
        return True

    def _tell_stored(self, chain: list[int], first: int, tokens: Sequence[int]) -> None:
        size = self.block_tokens
        stored = {
            "type": "BlockStored",
            "block_hashes": chain[first:],
            "parent_block_hash": chain[first - 1] if first else None,
            "token_ids": list(tokens[first * size : len(chain) * size]),
            "block_size": size,
            "lora_id": None,
            "lora_name": None,
            "extra_keys": [None] * (len(chain) - first),
            "group_idx": 0,
            "kv_cache_spec_kind": "full_attention",
        }
        self.events.extend({**stored, "medium": medium} for medium in self.media)
