"""What copies at full rate cost a model beside them: a bf16 matmul loop, and a kernel bound by memory bandwidth."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rig import BLOCK_TOKENS, Cache, Rig, Shape

ROUNDS = 5
SECONDS = 0.4


def _loop(work: Callable[[], object], repeat: int) -> float:
    """Seconds the device takes for the work, by events on the current stream."""
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    for _ in range(repeat):
        work()
    after.record()
    while not after.query():
        time.sleep(0.0005)
    return before.elapsed_time(after) / 1e3


def _repeats(work: Callable[[], object]) -> int:
    """How often the work fits into the time of one measurement."""
    _loop(work, 3)
    return max(3, int(SECONDS / (_loop(work, 10) / 10)))


def measure(pool_dir: Path, nvrtc: list[str]) -> dict[str, float]:
    """Slowdown of both loops beside offloads that never cease, as a share: medians of alternating rounds in one run."""
    device = torch.device("cuda:0")
    factor = torch.rand(4096, 4096, device=device, dtype=torch.bfloat16)
    large = torch.rand(256 << 18, device=device)
    into = torch.empty_like(large)
    loops = {"matmul": lambda: torch.mm(factor, factor), "bandwidth": lambda: torch.add(large, 1.0, out=into)}
    shape = Shape("BLHNC", 32, 129, heads=8, tokens=BLOCK_TOKENS, width=256)
    cache = Cache(shape, device)
    found: dict[str, float] = {}
    # Offloads come after what their stream was given: one that computes nothing lets them run beside the loop.
    idle = torch.cuda.Stream(device)
    with torch.cuda.stream(torch.cuda.Stream(device)), Rig(cache, 128, pool_dir, nvrtc) as rig:
        blocks = list(range(1, 129))
        for name, work in loops.items():
            repeat, alone, beside, moved, seconds = _repeats(work), [], [], 0, 0.0
            for turn in range(ROUNDS):
                alone.append(_loop(work, repeat))
                started = time.perf_counter()
                before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                stores = 0
                before.record()
                for _ in range(repeat):
                    work()
                after.record()
                while not after.query():
                    rig.engine.pending_work()
                    if not dict(rig.engine.gauges())["filling_slots"]:
                        with torch.cuda.stream(idle):
                            rig.store(f"{name} {turn} {stores}", blocks, lambda: None)
                        stores += 1
                beside.append(before.elapsed_time(after) / 1e3)
                rig.settle()
                seconds += time.perf_counter() - started
                moved += stores * len(blocks) * shape.block_bytes
            found[f"{name}_slowdown"] = statistics.median(beside) / statistics.median(alone) - 1.0
            found[f"{name}_offload_gb_s"] = moved / seconds / 1e9
    return found
