"""Bit-exact round trips of KV blocks through the pool, over torch tensors in a GPU's memory, while the device sleeps.

The host gives all its orders before the device computes what they are about: a copy that does not come after the right
work moves other bytes, and a hook that waits for the device is caught. Skipped, with the reason, where there is no GPU.
Run by `scripts/gpu-check` with nothing but Python and torch, and by pytest. `KVCELLAR_HARDWARE_DEVICE=cpu` tries the
same over host memory, where nothing sleeps and the bytes alone are compared.
"""

import os
import random
import shutil
import tempfile
import unittest
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from compute import DEVICE, Compute, why_skipped
from kvcellar import nvrtc
from rig import LAYOUTS, Cache, Rig, Shape, pick

SEED = int(os.environ.get("KVCELLAR_SEED", "7"))
SKIPPED = why_skipped()
MIB = 1 << 20
# Over host memory the tests themselves are tried, not a copier: many layers would only take long.
LAYERS = (1, 2, 17, 80) if DEVICE.type == "cuda" else (1, 2, 17)
STEPS = 4


@unittest.skipIf(SKIPPED is not None, f"no round trips over a GPU: {SKIPPED}")
class RoundTrips(unittest.TestCase):
    """What is loaded is what was stored, whatever computes meanwhile, and no hook waits for the device."""

    @classmethod
    def setUpClass(cls) -> None:
        print(f"KVCELLAR_SEED={SEED}", flush=True)
        if DEVICE.type != "cuda":
            print("over host memory nothing sleeps: whether hooks wait for a device is not tested", flush=True)

    def setUp(self) -> None:
        self.pool_dir = Path(tempfile.mkdtemp(dir="/dev/shm"))
        self.addCleanup(shutil.rmtree, self.pool_dir)
        self.random = random.Random(SEED)

    @contextmanager
    def rig(self, shape: Shape, slots: int, on_default_stream: bool = False) -> Iterator[tuple[Compute, Rig]]:
        with Compute(on_default_stream) as compute:
            cache = Cache(shape, DEVICE, SEED)
            compute.wait()
            with Rig(cache, slots, self.pool_dir, nvrtc.libraries()) as rig:
                yield compute, rig

    def rounds(self, shape: Shape, *in_a_row: bool, on_default_stream: bool = False) -> None:
        """Round trips on one rig, of blocks in a row or of scattered ones, each while the device sleeps.

        One more comes first, with the device awake: slots are pinned and kernels loaded then, and while the driver does
        that it may wait for the device.
        """
        with self.subTest(shape=shape), self.rig(shape, shape.blocks, on_default_stream) as (compute, rig):
            for number, neighbours in enumerate((True, *in_a_row)):
                self.round_trip(compute, rig, f"round {number}", neighbours, nap=number > 0)

    def round_trip(self, compute: Compute, rig: Rig, name: str, in_a_row: bool, nap: bool) -> None:
        cache, count = rig.cache, (rig.cache.shape.blocks - 1) // 2
        sources, targets = pick(self.random, cache.shape.blocks, count, in_a_row)
        at_sources, at_targets = cache.pages(sources), cache.pages(targets)
        stored, later, before, stale = (cache.content(count) for _ in range(4))
        read, loaded, kept = (torch.empty_like(stored) for _ in range(3))
        cache.write(at_targets, before)

        self.fall_asleep(compute, rig, name, nap)
        rig.store(name, sources, lambda: cache.write(at_sources, stored))
        # The next step writes the same blocks, as soon as they have been read.
        rig.overwrite(sources, lambda: cache.write(at_sources, later))
        filling = rig.filling()
        # The bytes are not there yet, so nothing may be visible.
        assert filling == count or not compute.asleep(), f"{name}: {filling} of {count} are under way"
        rig.settle()

        self.fall_asleep(compute, rig, name, nap)
        # Steps before the load that still use its destination: one reads it, one writes it.
        cache.read(at_targets, read)
        cache.write(at_targets, stale)
        request = rig.begin_load(name, targets)
        ended = rig.is_loaded(request)
        assert not (ended and compute.asleep()), f"{name}: a load ended before its destination was free"
        if not ended:
            rig.wait_for(request)
        # The model's stream was not told of the load: vLLM launches what reads the blocks when it
        # has heard of its end.
        cache.read(at_targets, loaded)
        cache.read(at_sources, kept)
        self.assert_same(cache, read, before, targets, f"{name}: a step before the load read what it loads")
        self.assert_same(cache, loaded, stored, targets, f"{name}: what was loaded is not what was stored")
        self.assert_same(cache, kept, later, sources, f"{name}: blocks changed that nobody loaded into")

    def fall_asleep(self, compute: Compute, rig: Rig, name: str, nap: bool) -> None:
        """From a device that has nothing to do: a nap begins at once, and every hook has to return within it."""
        compute.wait()
        rig.returned = lambda hook: compute.must_sleep(f"{name}: {hook}")
        if nap:
            compute.sleep()

    def assert_same(
        self, cache: Cache, found: torch.Tensor, wanted: torch.Tensor, blocks: list[int], what: str
    ) -> None:
        differing = [blocks[place] for place in cache.differing(found, wanted)]
        assert not differing, f"{what}: blocks {differing}"

    def test_all_layouts_and_numbers_of_layers(self) -> None:
        for layout in LAYOUTS:
            for layers in LAYERS:
                self.rounds(Shape(layout, layers, 41, heads=2, tokens=16, width=256), True, False)

    def test_blocks_from_4_kib_to_4_mib(self) -> None:
        for layout in LAYOUTS:
            for block_bytes in (4 << 10, 64 << 10, 512 << 10, 4 * MIB):
                width = block_bytes // (4 * 2 * 16)
                self.rounds(Shape(layout, 4, 17, heads=2, tokens=16, width=width), False)

    def test_kernel_blocks_finer_than_blocks(self) -> None:
        for layout in LAYOUTS:
            for ratio in (2, 8):
                self.rounds(Shape(layout, 5, 33, heads=2, tokens=4, width=128, ratio=ratio), False)

    def test_sizes_that_are_no_words(self) -> None:
        for layout in LAYOUTS:
            self.rounds(Shape(layout, 3, 21, heads=1, tokens=3, width=37), False)

    def test_a_model_on_the_default_stream(self) -> None:
        self.rounds(Shape("BLHNC", 4, 25, heads=2, tokens=16, width=1024), True, False, on_default_stream=True)

    def test_steps_in_a_row_that_compute_the_same_blocks(self) -> None:
        for layout in LAYOUTS:
            shape = Shape(layout, 6, 41, heads=2, tokens=16, width=512)
            with self.subTest(shape=shape), self.rig(shape, STEPS * shape.blocks) as (compute, rig):
                for number, nap in enumerate((False, True, True)):
                    self.steps_in_a_row(compute, rig, f"round {number}", nap)

    def steps_in_a_row(self, compute: Compute, rig: Rig, name: str, nap: bool) -> None:
        cache, count = rig.cache, (rig.cache.shape.blocks - 1) // 2
        sources, targets = pick(self.random, cache.shape.blocks, count, in_a_row=False)
        at_sources, at_targets = cache.pages(sources), cache.pages(targets)
        contents = [cache.content(count) for _ in range(STEPS)]
        loaded = torch.empty_like(contents[0])
        self.fall_asleep(compute, rig, name, nap)
        for step, content in enumerate(contents):
            rig.store(f"{name} {step}", sources, partial(cache.write, at_sources, content), reallocated=True)
        filling = rig.filling()
        assert filling == STEPS * count or not compute.asleep(), f"{name}: {filling} are under way"
        rig.settle()
        compute.wait()
        for step, content in enumerate(contents):
            rig.wait_for(rig.begin_load(f"{name} {step}", targets))
            cache.read(at_targets, loaded)
            what = f"{name}: what was loaded is not what step {step} stored"
            self.assert_same(cache, loaded, content, targets, what)


if __name__ == "__main__":
    unittest.main()
