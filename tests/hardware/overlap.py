"""What offloads at full rate cost a model beside them: a bf16 matmul loop, and a kernel bound by memory bandwidth.

A loop runs in turns, alone and beside offloads, and each turn beside them is compared with its neighbour alone. Turns
are timed on the device. All launches of a turn fit into a stream's queue, so the host never waits in one and can feed
the copier all the time: two batches of offloads are under way whenever it looks. Not measured: a model's own steps, and
loads.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from compute import DEVICE, Compute
from rig import BLOCK_TOKENS, Cache, Rig, Shape

# A stream's queue holds about a thousand launches; then launching blocks.
LAUNCHES_MAX = 250
# The device starts this much later than the host, so that it never waits for a launch.
LEAD_MS = 3.0
FEED_EVERY = 8
POLL_S = 0.0001
BATCHES_IN_FLIGHT = 2


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        matmul: rows and columns of the factors.
        stream_bytes: each of the two buffers that the other loop goes through; less where memory is short.
        batch_bytes: offloaded in one step.
        turn_s: how long a turn takes.
        turns: of each kind.
    """

    matmul: int = 8192
    stream_bytes: int = 2 << 30
    batch_bytes: int = 128 << 20
    turn_s: float = 0.3
    turns: int = 7


# Where the code is only tried.
TINY = Size(matmul=64, stream_bytes=1 << 20, batch_bytes=4 << 20, turn_s=0.02, turns=2)


@dataclass(frozen=True)
class Cost:
    """What offloads cost one loop.

    Attributes:
        loop: which.
        pieces: how a block lies in the KV cache.
        slowdown: median over the turns of the time beside offloads, over the time alone, less 1.
        slowdown_low: the least of a turn.
        slowdown_high: the most of a turn.
        offloading_share: of the time measured beside offloads, how much had one under way; at least.
        offload_gb_s: their rate beside the loop.
        offload_gb_s_alone: their rate beside nothing.
        turn_s: the median turn alone.
        launches: in a turn.
        notes: what the copier has told.
    """

    loop: str
    pieces: str
    slowdown: float
    slowdown_low: float
    slowdown_high: float
    offloading_share: float
    offload_gb_s: float
    offload_gb_s_alone: float
    turn_s: float
    launches: int
    notes: list[str]


class Turn:
    """Time that a stream spends on what it is given between `begin` and `end`. Over host memory: the host's time."""

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if on_gpu else []
        self._times: list[float] = []

    def _mark(self) -> None:
        if self._on_gpu:
            self._events[len(self._times)].record()
        self._times.append(time.perf_counter())

    def begin(self) -> None:
        self._mark()

    def end(self) -> None:
        self._mark()

    def is_over(self) -> bool:
        return not self._on_gpu or bool(self._events[1].query())

    def seconds(self) -> float:
        if self._on_gpu:
            return float(self._events[0].elapsed_time(self._events[1])) / 1e3
        return self._times[1] - self._times[0]


@dataclass(frozen=True)
class Moved:
    """Offloads from the first order to the last answer.

    Attributes:
        bytes: that were offloaded.
        busy_s: time with an offload under way, as the worker tells.
        wall_s: all of the time.
    """

    bytes: int
    busy_s: float
    wall_s: float


class Feed:
    """Offloads that never cease while they are topped up, of blocks that nobody computes.

    Attributes:
        pieces: how a block lies in the KV cache.
        gb_s_alone: the rate of the last `run_alone`.
    """

    def __init__(self, rig: Rig, pieces: str, batch_blocks: int) -> None:
        self.pieces = pieces
        self.gb_s_alone = 0.0
        self._rig = rig
        self._batch_blocks = batch_blocks
        # By turns, so that no block is under way twice.
        self._batches = [
            list(range(1 + first * batch_blocks, 1 + (first + 1) * batch_blocks)) for first in range(BATCHES_IN_FLIGHT)
        ]
        self._number = 0
        self._began = 0.0
        # Offloads come after what their stream was given: behind one that computes nothing they run
        # beside the loop.
        self._idle = torch.cuda.Stream(DEVICE) if DEVICE.type == "cuda" else None

    def begin(self) -> None:
        self._rig.settle()
        self._rig.worker.take_stats()
        self._began = time.perf_counter()
        self.top_up()

    def top_up(self) -> None:
        """Starts what is missing of the batches that should be under way."""
        while self._rig.filling() <= (BATCHES_IN_FLIGHT - 1) * self._batch_blocks:
            blocks = self._batches[self._number % len(self._batches)]
            self._number += 1
            with torch.cuda.stream(self._idle):
                self._rig.store(f"batch {self._number}", blocks, lambda: None)

    def end(self) -> Moved:
        self._rig.settle()
        wall_s = time.perf_counter() - self._began
        report = self._rig.worker.take_stats()
        if report is None:
            raise RuntimeError(f"nothing was offloaded; the copier says: {self._rig.notes()}")
        return Moved(report.offload_bytes, report.offload_seconds, wall_s)

    def notes(self) -> list[str]:
        return self._rig.notes()

    def run_alone(self, seconds: float) -> None:
        """Offloads beside nothing."""
        self.begin()
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            self.top_up()
            time.sleep(POLL_S)
        moved = self.end()
        self.gb_s_alone = moved.bytes / moved.busy_s / 1e9


@dataclass(frozen=True)
class Loop:
    """What is repeated: one call, one launch."""

    name: str
    work: Callable[[], object]


def _run(compute: Compute, loop: Loop, launches: int, feed: Feed | None = None) -> float:
    """Seconds the device takes for a turn. A feed begins before its first launch, and is to be ended after it."""
    turn = Turn(compute.on_gpu)
    if feed is not None:
        feed.begin()
    compute.doze(LEAD_MS)
    turn.begin()
    for launch in range(launches):
        loop.work()
        if feed is not None and launch % FEED_EVERY == 0:
            feed.top_up()
    turn.end()
    while not turn.is_over():
        if feed is not None:
            feed.top_up()
        time.sleep(POLL_S)
    return turn.seconds()


def _cost(compute: Compute, loop: Loop, feed: Feed, size: Size) -> Cost:
    _run(compute, loop, 3)
    launches = max(3, min(LAUNCHES_MAX, int(size.turn_s / (_run(compute, loop, 10) / 10))))
    # The device gets as warm as it will be.
    _run(compute, loop, launches, feed)
    feed.end()
    alone: list[float] = []
    beside: list[float] = []
    moved: list[Moved] = []
    for turn in range(size.turns):
        # In changing order: neither kind always comes second.
        for with_offloads in (turn % 2 == 0, turn % 2 == 1):
            if with_offloads:
                beside.append(_run(compute, loop, launches, feed))
                moved.append(feed.end())
            else:
                alone.append(_run(compute, loop, launches))
    slowdowns = [offloading / idle - 1.0 for offloading, idle in zip(beside, alone, strict=True)]
    # Whatever was idle from the first order to the last answer counts as idle while the loop ran.
    idle_s = sum(one.wall_s - one.busy_s for one in moved)
    return Cost(
        loop=loop.name,
        pieces=feed.pieces,
        slowdown=statistics.median(slowdowns),
        slowdown_low=min(slowdowns),
        slowdown_high=max(slowdowns),
        offloading_share=min(1.0, max(0.0, 1.0 - idle_s / sum(beside))),
        offload_gb_s=sum(one.bytes for one in moved) / sum(one.busy_s for one in moved) / 1e9,
        offload_gb_s_alone=feed.gb_s_alone,
        turn_s=statistics.median(alone),
        launches=launches,
        notes=feed.notes(),
    )


def _stream_bytes(size: Size) -> int:
    """What both buffers may take of the memory that is free."""
    free = torch.cuda.mem_get_info(DEVICE)[0] if DEVICE.type == "cuda" else size.stream_bytes * 4
    return min(size.stream_bytes, free // 4) & ~0xFFF


def shapes(batch_bytes: int) -> dict[str, Shape]:
    """KV caches that hold all batches: one whose blocks are single pieces, and one whose blocks are many small ones."""

    def of(layout: str, layers: int, width: int) -> Shape:
        one = Shape(layout, layers, 1, heads=8, tokens=BLOCK_TOKENS, width=width)
        blocks = 1 + BATCHES_IN_FLIGHT * (batch_bytes // one.block_bytes)
        return Shape(layout, layers, blocks, heads=8, tokens=BLOCK_TOKENS, width=width)

    return {"1 MiB pieces": of("BLHNC", 32, 256), "8 KiB pieces": of("LBHNC", 32, 64)}


def measure(pool_dir: Path, nvrtc: list[str], size: Size) -> Iterator[Cost]:
    """The costs of offloads of each shape to each loop, one after the other."""
    with Compute() as compute:
        factor = torch.rand(size.matmul, size.matmul, device=DEVICE, dtype=torch.bfloat16)
        product = torch.empty_like(factor)
        large = torch.rand(_stream_bytes(size) // 4, device=DEVICE)
        into = torch.empty_like(large)
        loops = [
            Loop("matmul", lambda: torch.mm(factor, factor, out=product)),
            Loop("bandwidth", lambda: torch.add(large, 1.0, out=into)),
        ]
        for pieces, shape in shapes(size.batch_bytes).items():
            batch_blocks = size.batch_bytes // shape.block_bytes
            cache = Cache(shape, DEVICE, seed=0)
            compute.wait()
            # Twice what is under way: a batch finds slots whose blocks are all there, and may be
            # given up.
            with Rig(cache, 2 * BATCHES_IN_FLIGHT * batch_blocks, pool_dir, nvrtc) as rig:
                feed = Feed(rig, pieces, batch_blocks)
                # The first batches wait until their slots are pinned: the second run counts.
                for _ in range(2):
                    feed.run_alone(size.turn_s)
                for loop in loops:
                    yield _cost(compute, loop, feed, size)
