"""Bit-exact round trips of KV blocks through the pool, over torch tensors in a GPU's memory.

Skipped, with the reason, where there is none. Run by `scripts/gpu-check` with nothing but Python and torch, and by
pytest. `KVCELLAR_HARDWARE_DEVICE=cpu` tries the same over host memory.
"""

import os
import random
import shutil
import tempfile
import unittest
from pathlib import Path

import torch
from kvcellar import nvrtc
from rig import LAYOUTS, Cache, Rig, Shape, pick, why_skipped

DEVICE = torch.device(os.environ.get("KVCELLAR_HARDWARE_DEVICE", "cuda:0"))
SEED = int(os.environ.get("KVCELLAR_SEED", "7"))
SKIPPED = why_skipped() if DEVICE.type == "cuda" else None
MIB = 1 << 20
# Over host memory the tests themselves are tried, not a copier: many layers would only take long.
LAYERS = (1, 2, 17, 80) if DEVICE.type == "cuda" else (1, 2, 17)


class Compute:
    """A stream on which the model computes, and another that keeps the device busy beside it."""

    def __init__(self) -> None:
        self.on_gpu = DEVICE.type == "cuda"
        if self.on_gpu:
            self.stream, self.beside = torch.cuda.Stream(DEVICE), torch.cuda.Stream(DEVICE)
            self.factor = torch.rand(2048, 2048, device=DEVICE, dtype=torch.bfloat16)

    def __enter__(self) -> "Compute":
        if self.on_gpu:
            self.context = torch.cuda.stream(self.stream)
            self.context.__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        if self.on_gpu:
            self.context.__exit__(*raised)
            torch.cuda.synchronize(DEVICE)

    def keep_busy(self, rounds: int = 40) -> None:
        """Work on both streams that is still running when the calls after this are made."""
        if not self.on_gpu:
            return
        for stream in (self.stream, self.beside):
            with torch.cuda.stream(stream):
                for _ in range(rounds):
                    torch.mm(self.factor, self.factor)


@unittest.skipIf(SKIPPED is not None, f"no round trips over a GPU: {SKIPPED}")
class RoundTrips(unittest.TestCase):
    """What is loaded is what was stored, whatever computes meanwhile."""

    def setUp(self) -> None:
        self.pool_dir = Path(tempfile.mkdtemp(dir="/dev/shm"))
        self.addCleanup(shutil.rmtree, self.pool_dir)
        self.random = random.Random(SEED)
        print(f"KVCELLAR_SEED={SEED}", flush=True)

    def round_trip(self, shape: Shape, in_a_row: bool) -> None:
        count = (shape.blocks - 1) // 2
        cache = Cache(shape, DEVICE)
        with Compute() as compute, Rig(cache, count, self.pool_dir, nvrtc.libraries()) as rig:
            sources, targets = pick(self.random, shape.blocks, count, in_a_row)
            compute.keep_busy()
            rig.store("a", sources, lambda: cache.scramble(sources))
            wanted = [cache.block(block) for block in sources]
            # The next step writes the same blocks while they are still being read.
            rig.overwrite(sources, lambda: cache.scramble(sources))
            rig.settle()
            compute.keep_busy()
            cache.scramble(targets)
            untouched = [cache.block(block) for block in sources]
            rig.load("a", targets)
            for target, block in zip(targets, wanted, strict=True):
                assert torch.equal(cache.block(target), block), f"{shape}: block {target} came back changed"
            for source, block in zip(sources, untouched, strict=True):
                assert torch.equal(cache.block(source), block), f"{shape}: block {source} was written"

    def test_all_layouts_and_numbers_of_layers(self) -> None:
        for layout in LAYOUTS:
            for layers in LAYERS:
                for in_a_row in (True, False):
                    with self.subTest(layout=layout, layers=layers, in_a_row=in_a_row):
                        self.round_trip(Shape(layout, layers, 41, heads=2, tokens=16, width=256), in_a_row)

    def test_blocks_from_4_kib_to_4_mib(self) -> None:
        for layout in LAYOUTS:
            for block_bytes in (4 << 10, 64 << 10, 512 << 10, 4 * MIB):
                with self.subTest(layout=layout, block_bytes=block_bytes):
                    width = block_bytes // (4 * 2 * 16)
                    self.round_trip(Shape(layout, 4, 25, heads=2, tokens=16, width=width), in_a_row=False)

    def test_kernel_blocks_finer_than_blocks(self) -> None:
        for layout in LAYOUTS:
            for ratio in (2, 8):
                with self.subTest(layout=layout, ratio=ratio):
                    self.round_trip(Shape(layout, 5, 33, heads=2, tokens=4, width=128, ratio=ratio), in_a_row=False)

    def test_sizes_that_are_no_words(self) -> None:
        for layout in LAYOUTS:
            with self.subTest(layout=layout):
                self.round_trip(Shape(layout, 3, 21, heads=1, tokens=3, width=37), in_a_row=False)


if __name__ == "__main__":
    unittest.main()
