"""The measurement of overlap in a tiny size, so that it cannot rot: what it finds there means nothing."""

import shutil
import tempfile
import unittest
from pathlib import Path

import overlap
from compute import why_skipped
from kvcellar import nvrtc

SKIPPED = why_skipped()


@unittest.skipIf(SKIPPED is not None, f"no overlap on a GPU: {SKIPPED}")
class Overlap(unittest.TestCase):
    def test_a_tiny_size_runs(self) -> None:
        pool_dir = Path(tempfile.mkdtemp(dir="/dev/shm"))
        self.addCleanup(shutil.rmtree, pool_dir)
        costs = list(overlap.measure(pool_dir, nvrtc.libraries(), overlap.TINY))
        assert [(cost.pieces, cost.loop) for cost in costs] == [
            (pieces, loop) for pieces in overlap.shapes(1) for loop in ("matmul", "bandwidth")
        ]
        for cost in costs:
            assert cost.slowdown_low <= cost.slowdown <= cost.slowdown_high
            assert 0.0 <= cost.offloading_share <= 1.0
            assert cost.offload_gb_s > 0.0
            assert 3 <= cost.launches <= overlap.LAUNCHES_MAX
