"""What the timed connector measured, as it lies in a file."""

import struct
import time
from dataclasses import dataclass
from pathlib import Path

FILE_VARIABLE = "KVCELLAR_TIMED_FILE"
LAYOUT = struct.Struct("<4q")


@dataclass(frozen=True)
class Sums:
    """What was measured so far.

    Attributes:
        connector_ns: thread CPU time inside our connector.
        calls: calls timed.
        steps: scheduler steps.
        process_ns: CPU time of all threads of EngineCore, at the last step.

    """

    connector_ns: int = 0
    calls: int = 0
    steps: int = 0
    process_ns: int = 0

    @classmethod
    def read(cls, path: Path) -> "Sums":
        """Reads the sums of a running engine."""
        return cls(*LAYOUT.unpack(path.read_bytes()[: LAYOUT.size]))

    def since(self, earlier: "Sums") -> "Sums":
        """What was added since."""
        return Sums(
            self.connector_ns - earlier.connector_ns,
            self.calls - earlier.calls,
            self.steps - earlier.steps,
            self.process_ns - earlier.process_ns,
        )


def clock_cost_ns() -> float:
    """Thread CPU time that one pair of clock readings adds to what it times."""
    rounds = 2000
    total = 0
    for _ in range(rounds):
        begin = time.thread_time_ns()
        total += time.thread_time_ns() - begin
    return total / rounds
