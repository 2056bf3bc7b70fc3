"""An independent model of the tiers, and a replay that holds a real engine's operation log against it.

The model knows nothing of the engine's code. It states the rules of the tier in plain Python:

- Resident, unpinned keys stand in one LRU order; the cold end is evicted first.
- Many keys that are used together go to the hot end in reverse order: the first block of a prefix is the hottest.
- A load pins its keys, which touches them and takes them out of the order until the last pin goes; then they are the
  hottest.
- A store touches candidates that are resident and unpinned, then takes a slot for each missing one: a free slot, else
  the coldest key's. If nothing can be evicted, or the coldest key was last touched by this very request, then this
  candidate and all further missing ones are dropped.
- A stored key is visible only when its batch is filled.
- A hit of a request ends at the last multiple of the block size that is at most `max_hit` and up to which every block
  from the local hit on is resident.
- Beside a disk, a block that is only there is a hit too. A load gives each such block a free slot, after evicting as
  for a store; one that gets none, or is being offloaded just then, streams through the window and stays on disk only.
- A block on disk is not offloaded again. A block that is being written is no victim. A block that is on disk may be
  evicted for its own request.
- When writes and reads begin and end is the engine's affair; what they concern must be possible.

- With several groups, a hit ends where each group has the blocks that its kind needs there: `Need`.
- What a finished request used is touched; of it, what no continuation needs goes to the cold end.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from tests.vllm.oplog import Op


class Disagreement(AssertionError):
    """The engine did something else than the model."""


# The numbers of a group's blocks that a request needs which resumes at so many tokens, for a number
# of tokens of a block.
Need = Callable[[int, int], range]


def whole_prefix(end: int, block_tokens: int) -> range:
    """Full attention."""
    return range(end // block_tokens)


def state_at_the_end(end: int, block_tokens: int) -> range:
    """A recurrence or convolution: its state after the last token stands for all."""
    return range(max(0, end // block_tokens - 1), end // block_tokens)


def own_chunk(chunk: int) -> Need:
    """Attention within chunks: the tokens of the next token's chunk."""

    def need(end: int, block_tokens: int) -> range:
        return range(end // chunk * chunk // block_tokens, end // block_tokens)

    return need


def window(tokens: int) -> Need:
    """A sliding window: a token sees itself and so many tokens less one before it."""

    def need(end: int, block_tokens: int) -> range:
        return range(max(0, end - tokens + 1) // block_tokens, end // block_tokens)

    return need


@dataclass(frozen=True)
class Placed:
    """What a store did with its missing candidates."""

    stored: list[str]
    evicted: list[str]
    dropped: list[str]


@dataclass(frozen=True)
class Counts:
    """Slots by state, and pinned keys."""

    total: int
    free: int
    filling: int
    filled: int
    pinned: int


@dataclass
class DramTier:
    """The state of the tier. `order` holds resident, unpinned keys from coldest to hottest."""

    slots: int
    order: OrderedDict[str, None] = field(default_factory=OrderedDict)
    pins: Counter[str] = field(default_factory=Counter)
    filling: dict[str, str] = field(default_factory=dict)
    toucher: dict[str, str] = field(default_factory=dict)
    # Slots whose key is gone while a copy still uses them: each is free once its copy has ended.
    doomed_fills: set[str] = field(default_factory=set)
    doomed_pins: Counter[str] = field(default_factory=Counter)
    # Blocks on disk, those on their way there, and those on their way back into a slot.
    disk: set[str] = field(default_factory=set)
    writing: set[str] = field(default_factory=set)
    restoring: set[str] = field(default_factory=set)

    def resident(self, key: str) -> bool:
        """Whether a lookup sees the key."""
        return key in self.order or (key in self.pins and key not in self.restoring)

    def available(self, key: str) -> bool:
        """Whether a lookup finds the key in any tier."""
        return self.resident(key) or key in self.disk

    def unpinned(self, key: str) -> bool:
        """Whether the key is resident and no load holds it."""
        return key in self.order

    def free(self) -> int:
        """Slots that hold nothing and are used by no copy."""
        doomed = len(self.doomed_fills) + len(self.doomed_pins)
        return self.slots - len(self.order) - len(self._held()) - len(self.filling) - len(self.restoring) - doomed

    def _held(self) -> set[str]:
        return set(self.pins) - self.restoring

    def counts(self) -> Counts:
        """Slots by state."""
        filling = len(self.filling) + len(self.restoring) + len(self.doomed_fills)
        filled = len(self.order) + len(self._held()) + len(self.doomed_pins)
        return Counts(self.slots, self.free(), filling, filled, len(self.pins) + len(self.doomed_pins))

    def hit(self, keys: Sequence[str], local: int, max_hit: int, block_tokens: int) -> int:
        """Tokens beyond `local` that can be loaded."""
        end = local // block_tokens
        while end < len(keys) and (end + 1) * block_tokens <= max_hit and self.available(keys[end]):
            end += 1
        return max(0, end * block_tokens - local)

    def touch(self, keys: Sequence[str], request: str) -> None:
        """Moves resident, unpinned keys to the hot end, the first of them hottest."""
        for key in reversed(keys):
            self.order.move_to_end(key)
            self.toucher[key] = request

    def cool(self, keys: Sequence[str]) -> None:
        """Moves resident, unpinned keys to the cold end, the first of them coldest."""
        for key in reversed(keys):
            self.order.move_to_end(key, last=False)

    def pin(self, keys: Iterable[str], request: str) -> None:
        """Holds resident keys for a load, which counts as a touch."""
        for key in keys:
            self.order.pop(key, None)
            self.pins[key] += 1
            self.toucher[key] = request

    def unpin(self, keys: Sequence[str]) -> None:
        """Ends one load's hold."""
        for key in reversed(keys):
            if self.doomed_pins[key] > 0:
                self._take(self.doomed_pins, key)
            elif self._take(self.pins, key) == 0 and key not in self.restoring:
                self.order[key] = None

    @staticmethod
    def _take(counter: Counter[str], key: str) -> int:
        counter[key] -= 1
        left = counter[key]
        if left == 0:
            del counter[key]
        return left

    def place(self, missing: Sequence[str], request: str) -> Placed:
        """Finds slots for keys that are neither resident nor filling."""
        stored: list[str] = []
        evicted: list[str] = []
        for index, key in enumerate(missing):
            if self.free() <= 0:
                victim = self.evict(request)
                if victim is None:
                    return Placed(stored, evicted, list(missing[index:]))
                evicted.append(victim)
            self.filling[key] = request
            stored.append(key)
        return Placed(stored, evicted, [])

    def evict(self, request: str) -> str | None:
        """Empties the slot of the coldest key, if it may go."""
        victim = next((key for key in self.order if key not in self.writing), None)
        if victim is None or (self.toucher.get(victim) == request and victim not in self.disk):
            return None
        del self.order[victim]
        return victim

    def make_room(self, count: int, request: str) -> list[str]:
        """Evicts until so many slots are free, or nothing may go."""
        evicted = []
        while self.free() < count and (victim := self.evict(request)) is not None:
            evicted.append(victim)
        return evicted

    def restore(self, keys: Iterable[str], request: str) -> tuple[list[str], list[str]]:
        """Gives slots, held for a load, to keys that only the disk has. Returns those with a slot and those without."""
        placed: list[str] = []
        streamed: list[str] = []
        for key in keys:
            if key in self.filling or self.free() <= 0:
                streamed.append(key)
                continue
            self.restoring.add(key)
            self.pins[key] += 1
            self.toucher[key] = request
            placed.append(key)
        return placed, streamed

    def fill(self, keys: Sequence[str]) -> None:
        """Makes stored keys visible."""
        for key in reversed(keys):
            self.toucher[key] = self.filling.pop(key)
            self.order[key] = None

    def lose(self, keys: Iterable[str]) -> None:
        """Frees the slots of keys whose copy failed, or whose copy has ended after a reset."""
        for key in keys:
            if key in self.doomed_fills:
                self.doomed_fills.discard(key)
            else:
                del self.filling[key]

    def drop(self, keys: Iterable[str]) -> None:
        """Forgets resident keys."""
        for key in keys:
            if key in self.pins:
                self.doomed_pins[key] += self.pins.pop(key)
            else:
                self.order.pop(key, None)

    def reset(self) -> None:
        """Forgets everything; copies in flight keep their slots until they end."""
        self.order.clear()
        self.doomed_pins += self.pins
        self.pins.clear()
        self.doomed_fills |= set(self.filling)
        self.filling.clear()


@dataclass
class Replay:
    """Feeds a log to the model and compares every outcome. Raises `Disagreement` at the first difference."""

    block_tokens: int
    # One a group; the groups have blocks of one size.
    needs: Sequence[Need] = (whole_prefix,)
    tier: DramTier | None = None
    index: int = -1
    op: Op = field(default_factory=dict)
    hit_tokens: int = 0
    stored_blocks: int = 0
    evicted_blocks: int = 0
    dropped_blocks: int = 0
    lost_blocks: int = 0
    # Evicted without ever having been written, where there is a disk.
    unspilled_blocks: int = 0
    disk_hit_tokens: int = 0
    spilled_blocks: int = 0
    streamed_blocks: int = 0
    has_disk: bool = False
    # Blocks being read from disk, by how: into a slot of their own or through the window, the
    # earliest first.
    reads: dict[str, list[str]] = field(default_factory=dict)
    lookups: int = 0
    waits: int = 0
    states: int = 0
    promised: dict[str, int] = field(default_factory=dict)
    loads: dict[str, list[str]] = field(default_factory=dict)
    batches: dict[int, list[str]] = field(default_factory=dict)
    used: dict[str, dict[str, None]] = field(default_factory=dict)
    # Members of a batch that did not become visible with the others: the next operation must say
    # that they are lost.
    owed: tuple[int, list[str]] | None = None

    def run(self, ops: Iterable[Op]) -> "Replay":
        """Replays a whole log."""
        for op in ops:
            self.index += 1
            self.op = op
            self._step(op)
        return self

    def resident(self) -> set[str]:
        """Keys that lookups see at the end."""
        tier = self._tier()
        return set(tier.order) | set(tier.pins)

    def _tier(self) -> DramTier:
        if self.tier is None:
            raise self._disagreement("the first operation", "open", self.op.get("op"))
        return self.tier

    def _disagreement(self, what: str, expected: object, actual: object) -> Disagreement:
        shown = {name: value for name, value in self.op.items() if name != "keys"}
        return Disagreement(
            f"operation {self.index}: {what}: the model says {expected!r}, the engine {actual!r}; in {shown}"
        )

    def _same(self, what: str, expected: object, actual: object) -> None:
        if expected != actual:
            raise self._disagreement(what, expected, actual)

    def _step(self, op: Op) -> None:  # noqa: C901  (the one place that branches over operations)
        if self.owed is not None:
            self._same(
                "what follows a batch that was filled in part",
                ("lost", *self.owed),
                (op["op"], op.get("batch"), op.get("keys")),
            )
        match op["op"]:
            case "open":
                self._open(op)
            case "open_disk":
                self._same("reopened blocks (their keys are not in the log)", 0, op["reopened"])
                self.has_disk = True
                self._tier().slots -= op["window"]
            case "spill":
                self._spill(op)
            case "spilled":
                self._spilled(op)
            case "restored":
                self._restored(op)
            case "lookup":
                self._lookup(op)
            case "load":
                self._load(op)
            case "load_done":
                self._load_done(op)
            case "store":
                self._store(op)
            case "filled":
                self._filled(op)
            case "lost":
                self._lost(op)
            case "retire":
                self._retire(op)
            case "drop":
                self._tier().drop(op["keys"])
            case "reset":
                self._tier().reset()
                self.used.clear()
            case "state":
                self._state(op)
            case other:
                raise self._disagreement("the kind of operation", "a known one", other)

    def _open(self, op: Op) -> None:
        self._same("adopted blocks (their keys are not in the log, so it cannot be replayed)", 0, op["adopted"])
        self.tier = DramTier(op["slots"])

    def _lookup(self, op: Op) -> None:
        tier = self._tier()
        self._same("number of groups", len(self.needs), len(op["keys"]))
        hit = self._hit(op)
        self.lookups += 1
        if op["hit"] is None:
            self.waits += 1
            if not any(key in tier.pins for key in op["keys"][0][op["local"] // self.block_tokens :]):
                raise self._disagreement("the answer 'ask again', though nobody loads this prefix", hit, None)
            return
        self._same("the hit, in tokens", hit, op["hit"])
        self.promised[op["req"]] = hit

    def _hit(self, op: Op) -> int:
        """Tokens beyond vLLM's own that can be loaded: the largest end is tried first."""
        tier, local = self._tier(), op["local"]
        blocks = min(op["max_hit"] // self.block_tokens, *map(len, op["keys"]))
        for end in range(blocks * self.block_tokens, local, -self.block_tokens):
            groups = zip(self.needs, op["keys"], strict=True)
            if all(tier.available(keys[block]) for need, keys in groups for block in self._needed(need, local, end)):
                return int(end - local)
        return 0

    def _needed(self, need: Need, local: int, end: int) -> range:
        """A group's blocks that a load has to bring."""
        blocks = need(end, self.block_tokens)
        return range(max(blocks.start, local // self.block_tokens), blocks.stop)

    def _load(self, op: Op) -> None:
        tier = self._tier()
        if op["external"] > self.promised.get(op["req"], 0):
            raise self._disagreement("tokens to load", self.promised.get(op["req"], 0), op["external"])
        local, end = op["local"], op["local"] + op["external"]
        blocks = sum(len(self._needed(need, local, end)) for need in self.needs) if op["external"] else 0
        self._same("blocks to load", blocks, len(op["keys"]))
        absent = [key for key in op["keys"] if not tier.available(key)]
        self._same("keys to load that are not resident", [], absent)
        if op["req"] in self.loads:
            raise self._disagreement("loads in flight of this request", 0, 1)
        held = [key for key in op["keys"] if tier.resident(key) or key in tier.restoring]
        tier.pin(held, op["req"])
        if self.has_disk:
            held += self._restore(op, [key for key in op["keys"] if key not in set(held)])
        self.loads[op["req"]] = held
        self._uses(op["req"], op["keys"])
        self.hit_tokens += op["external"]

    def _restore(self, op: Op, below: list[str]) -> list[str]:
        """The part of a load that only the disk has. Returns the keys that got slots."""
        tier = self._tier()
        evicted = tier.make_room(sum(key not in tier.filling for key in below), op["req"])
        self._same("evicted keys", evicted, op["evicted"])
        self._evicts(evicted)
        placed, streamed = tier.restore(below, op["req"])
        self._same("keys restored into slots", placed, op["restore"])
        self._same("keys streamed through the window", streamed, op["window"])
        for keys, how in ((placed, "slot"), (streamed, "window")):
            for key in keys:
                self.reads.setdefault(key, []).append(how)
        self.streamed_blocks += len(streamed)
        self.disk_hit_tokens += len(below) * self.block_tokens
        return placed

    def _restored(self, op: Op) -> None:
        tier = self._tier()
        self._same("blocks that could not be read", [], op["lost"])
        for key in op["keys"]:
            how = self.reads.get(key, [])
            if not how:
                raise self._disagreement("reads of this key under way", 0, key)
            if how.pop(0) == "slot":
                tier.restoring.discard(key)

    def _spill(self, op: Op) -> None:
        tier = self._tier()
        wrong = [key for key in op["keys"] if not tier.resident(key) or key in tier.disk or key in tier.writing]
        self._same("keys to write that are absent, on disk or being written already", [], wrong)
        tier.writing |= set(op["keys"])
        absent = [key for key in op["evicted"] if key not in tier.disk or self.reads.get(key)]
        self._same("keys evicted from disk that are not there or are being read", [], absent)
        tier.disk -= set(op["evicted"])

    def _spilled(self, op: Op) -> None:
        tier = self._tier()
        self._same("written keys that were not being written", [], [k for k in op["keys"] if k not in tier.writing])
        tier.writing -= set(op["keys"])
        if op["ok"]:
            tier.disk |= set(op["keys"])
            self.spilled_blocks += len(op["keys"])

    def _evicts(self, keys: Sequence[str]) -> None:
        self.evicted_blocks += len(keys)
        if self.has_disk:
            self.unspilled_blocks += sum(key not in self._tier().disk for key in keys)

    def _load_done(self, op: Op) -> None:
        keys = self.loads.pop(op["req"], [])
        # Keys that a reset or a bad block took away meanwhile may be missing from the list.
        lasting = [key for key in keys if key not in self._tier().doomed_pins]
        self._same("keys of the finished load", lasting, [key for key in op["keys"] if key in lasting])
        self._same("further keys of the finished load", [], [key for key in op["keys"] if key not in keys])
        self._tier().unpin(keys)

    def _store(self, op: Op) -> None:
        tier = self._tier()
        absent = [key for key in op["touch"] if not tier.unpinned(key)]
        self._same("touched keys that are not resident or are pinned", [], absent)
        missing = op["keys"] + op["dropped"]
        known = [key for key in missing if tier.available(key) or key in tier.filling or key in tier.restoring]
        self._same("keys to store that are resident or filling already", [], known)
        self._same("keys to store twice in one operation", len(set(missing)), len(missing))
        tier.touch(op["touch"], op["req"])
        placed = tier.place(missing, op["req"])
        self._same("evicted keys", placed.evicted, op["evicted"])
        self._same("stored keys", placed.stored, op["keys"])
        self._same("dropped keys", placed.dropped, op["dropped"])
        self.batches.setdefault(op["batch"], []).extend(op["keys"])
        self._uses(op["req"], [*op["touch"], *op["keys"]])
        self.stored_blocks += len(placed.stored)
        self._evicts(placed.evicted)
        self.dropped_blocks += len(placed.dropped)

    def _filled(self, op: Op) -> None:
        batch = self.batches.pop(op["batch"], [])
        self._same("keys of the batch", [key for key in batch if key in set(op["keys"])], op["keys"])
        stale = [key for key in op["keys"] if key in self._tier().doomed_fills]
        self._same("keys that become visible after a reset", [], stale)
        self._tier().fill(op["keys"])
        missing = [key for key in batch if key not in set(op["keys"])]
        if missing:
            self.owed = (op["batch"], missing)
            self.batches[op["batch"]] = missing

    def _lost(self, op: Op) -> None:
        self._same("keys of the batch", self.batches.pop(op["batch"], []), op["keys"])
        self._tier().lose(op["keys"])
        self.lost_blocks += len(op["keys"])
        self.owed = None

    def _retire(self, op: Op) -> None:
        tier = self._tier()
        absent = [key for key in op["keys"] if not tier.unpinned(key)]
        self._same("retired keys that are not resident or are pinned", [], absent)
        used = self.used.pop(op["req"], {})
        cold = op.get("cold", [])
        ended = {*op["keys"], *cold}
        forgotten = [key for key in used if tier.unpinned(key) and key not in ended]
        self._same("resident keys of the request that its end did not touch", [], forgotten)
        tier.touch(op["keys"], op["req"])
        tier.cool([key for key in cold if tier.unpinned(key)])

    def _uses(self, request: str, keys: Iterable[str]) -> None:
        self.used.setdefault(request, {}).update(dict.fromkeys(keys))

    def _state(self, op: Op) -> None:
        counts = self._tier().counts()
        self.states += 1
        self._same("slots in all", counts.total, op["total"])
        self._same("free slots", counts.free, op["free"])
        self._same("filling slots", counts.filling, op["filling"])
        self._same("filled slots", counts.filled, op["filled"])
        self._same("whether anything is pinned", counts.pinned > 0, op["pins"] > 0)
