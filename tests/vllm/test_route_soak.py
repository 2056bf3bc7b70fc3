"""A long mixed load through both front ends while fake engines come and go: nothing grows, hangs or is lost.

The short one makes the same assertions in every run of the tests. KVCELLAR_SOAK_S sets the length of the long one.
"""

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path
from random import Random

import psutil
import pytest

from tests.vllm.fake import Fake
from tests.vllm.router import open_envoy, open_router
from tests.vllm.soak_campaign import Campaign
from tests.vllm.soak_fleet import Fleet
from tests.vllm.soak_growth import Growth
from tests.vllm.soak_plan import BODY_BYTES_MAX

ENGINES = 5
SILENCE_S = 3
SHORT_ROUND_S = 8.0
SOAK_S = float(os.environ.get("KVCELLAR_SOAK_S", "1800"))
SOAK_ROUNDS = 6


@pytest.fixture
def fleet(tmp_path: Path, seed: int) -> Iterator[Fleet]:
    """Engines, running."""
    engines = {name: Fake(name, tmp_path) for name in (f"e{number}" for number in range(ENGINES))}
    made = Fleet(tmp_path / "engines.json", engines, Random(f"fleet-{seed}"))
    try:
        made.start()
        yield made
    finally:
        made.close()


def soak(fleet: Fleet, tmp_path: Path, seed: int, *, rounds: int, round_s: float, slack_mib: float) -> None:
    """A campaign, and what it has found."""
    flags = ["--engines-file", str(fleet.file), "--mode", "precise", "--silence-s", str(SILENCE_S)]
    flags += ["--body", f"{BODY_BYTES_MAX}B", "--memory", "256MiB"]
    with open_router(tmp_path, *flags) as router, open_envoy(tmp_path, router.picker_port) as envoy:
        growth = Growth(psutil.Process(router.process.pid), slack_mib=slack_mib)
        campaign = Campaign(router, str(envoy.base_url).rstrip("/"), fleet, Random(f"soak-{seed}"), growth, 60.0, 0.8)
        asyncio.run(campaign.run(rounds, round_s))
        counted = [line for line in router.admin.get("/metrics").text.splitlines() if "_total{" in line]
        print(json.dumps(campaign.books.table(), indent=1), *counted, sep="\n")
        print(f"longest {campaign.books.longest()}, at rest {growth.at_rest}")
        print(f"events {dict(fleet.happened)}; MiB at the start, after a third, at the end: {growth.medians()}")
        assert not campaign.problems, "\n".join(campaign.problems[:50])


def test_a_short_soak(fleet: Fleet, tmp_path: Path, seed: int) -> None:
    soak(fleet, tmp_path, seed, rounds=2, round_s=SHORT_ROUND_S, slack_mib=64.0)


@pytest.mark.soak
def test_a_long_soak(fleet: Fleet, tmp_path: Path, seed: int) -> None:
    soak(fleet, tmp_path, seed, rounds=SOAK_ROUNDS, round_s=SOAK_S / SOAK_ROUNDS, slack_mib=8.0)
