"""Deadlines that only turn a hang into a failure: how patient they are follows from how slow this machine is.

The pace is 1 on a good machine with nothing else to do (two cores, 2026) and grows with what is seen: a little fixed
work when the session begins, then each start of an engine. It never shrinks. Nothing here is a check of speed, and no
check of behaviour may depend on it, with one exception: loads that need not be large are smaller on slow machines.
"""

import hashlib
import os
import sys
import time
from dataclasses import dataclass

# Sets the pace: to try a slow machine's ways on a good one, and for runs beside other work.
VARIABLE = "KVCELLAR_TEST_PACE"
PACE_MAX = 30.0
# What the fixed work takes on a good machine, measured when it is idle.
WORK_GOOD_S = 0.1
WORK_ROUNDS = 600_000
# Loads shrink from here on: where a session is only a little late, each seed means the same
# everywhere.
SLOW_PACE = 2.0


@dataclass
class Pace:
    """How many times slower than a good machine this one has shown itself."""

    factor: float = 1.0

    def see(self, seconds: float, good_seconds: float) -> None:
        """Learns from a piece of work that takes so long on a good machine."""
        self.factor = min(max(self.factor, seconds / good_seconds), PACE_MAX)


def work_seconds() -> float:
    """The fixed work: interpreter and hashing, on one core. The best of three, so that one pause does not count."""
    return min(_work_once() for _ in range(3))


def _work_once() -> float:
    begin = time.perf_counter()
    digest = hashlib.sha256()
    for number in range(WORK_ROUNDS):
        digest.update(number.to_bytes(64, "little"))
    return time.perf_counter() - begin


def _at_the_start() -> Pace:
    pace = Pace()
    pace.see(float(os.environ.get(VARIABLE, "1")), 1.0)
    pace.see(work_seconds(), WORK_GOOD_S)
    return pace


PACE = _at_the_start()


def deadline(good_seconds: float) -> float:
    """Seconds to wait here for what is certain to come within `good_seconds` on a good machine."""
    return good_seconds * PACE.factor


def shrunk(full: int, least: int) -> int:
    """The size of a load that need not be full: smaller on a slow machine, and never below `least`."""
    if PACE.factor < SLOW_PACE:
        return full
    return max(least, round(full / PACE.factor))


if __name__ == "__main__":
    # For scripts: the deadline for the seconds given, as a whole number.
    print(round(deadline(float(sys.argv[1]))))
