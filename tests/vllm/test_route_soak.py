"""A long mixed load through both front ends while fake engines come and go: nothing grows, hangs or is lost.

The short one makes the same assertions in every run of the tests. KVCELLAR_SOAK_S sets the length of the long one.
"""

import asyncio
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import psutil
import pytest

from tests.deadlines import shrunk
from tests.vllm.fake import Fake
from tests.vllm.router import open_envoy, open_router
from tests.vllm.soak_campaign import Campaign
from tests.vllm.soak_fleet import Fleet
from tests.vllm.soak_growth import Growth
from tests.vllm.soak_plan import BODY_BYTES_MAX

ENGINES = 5
SILENCE_S = 3
# Fewer than clients have open at the worst.
IN_FLIGHT_MAX = 24
SOAK_S = float(os.environ.get("KVCELLAR_SOAK_S", "1800"))


@dataclass(frozen=True)
class Length:
    """How long a soak is, and what it may leave behind."""

    rounds: int
    round_s: float
    rest_s: float
    slack_mib: float
    slack_fds: int


# Too short for the allocator to be warm; connections to engines may still be idle.
SHORT = Length(2, 7.0, 3.0, 64.0, 40)
# A rest is longer than any idle connection is kept.
LONG = Length(4, SOAK_S / 4, 100.0, 8.0, 4)


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


def soak(fleet: Fleet, tmp_path: Path, seed: int, length: Length) -> None:
    """A campaign, and what it has found."""
    flags = ["--engines-file", str(fleet.file), "--mode", "precise", "--silence-s", str(SILENCE_S)]
    flags += ["--body", f"{BODY_BYTES_MAX}B", "--memory", "256MiB", "--in-flight", str(IN_FLIGHT_MAX)]
    with open_router(tmp_path, *flags) as router, open_envoy(tmp_path, router.picker_port) as envoy:
        growth = Growth(psutil.Process(router.process.pid), length.slack_mib, slack_fds=length.slack_fds)
        campaign = Campaign(
            router,
            str(envoy.base_url).rstrip("/"),
            fleet,
            Random(f"soak-{seed}"),
            growth,
            rate=float(shrunk(60, 10)),
            disturb_every_s=0.8,
            rest_s=length.rest_s,
        )
        asyncio.run(campaign.run(length.rounds, length.round_s))
        counted = [line for line in router.admin.get("/metrics").text.splitlines() if "_total{" in line]
        print(json.dumps(campaign.books.table(), indent=1), *counted, sep="\n")
        print(f"longest {campaign.books.longest()}, at rest {growth.at_rest}")
        print(f"events {dict(fleet.happened)}; MiB at the start, after a third, at the end: {growth.medians()}")
        assert not campaign.problems, "\n".join(campaign.problems[:50])


def test_a_short_soak(fleet: Fleet, tmp_path: Path, seed: int) -> None:
    soak(fleet, tmp_path, seed, SHORT)


@pytest.mark.soak
def test_a_long_soak(fleet: Fleet, tmp_path: Path, seed: int) -> None:
    soak(fleet, tmp_path, seed, LONG)
