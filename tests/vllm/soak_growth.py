"""What a process holds over time: memory, descriptors, threads."""

import asyncio
import statistics
from dataclasses import dataclass, field

import psutil

MIB = 1 << 20


@dataclass(frozen=True)
class Sample:
    """One look."""

    rss: int
    fds: int
    threads: int


def look(process: psutil.Process) -> Sample:
    """How it is now."""
    return Sample(process.memory_info().rss, process.num_fds(), process.num_threads())


@dataclass
class Growth:
    """Looks at a process all the time, and when it is at rest."""

    process: psutil.Process
    # A share of what it had, and MiB that its allocator may take before it is warm.
    slack_mib: float
    share: float = 0.10
    # Idle connections that it may keep, beside those that it had at its first rest.
    slack_fds: int = 4
    samples: list[Sample] = field(default_factory=list)
    at_rest: list[Sample] = field(default_factory=list)

    async def watch(self, every_s: float = 1.0) -> None:
        """For ever."""
        while True:
            self.samples.append(look(self.process))
            await asyncio.sleep(every_s)

    def rest(self) -> None:
        """It has nothing to do now."""
        self.at_rest.append(look(self.process))

    def medians(self) -> tuple[float, float, float]:
        """MiB: at the beginning, after a third, at the end; each over a sixth of the time."""
        sixth = len(self.samples) // 6
        assert sixth, "too short to tell"
        pieces = (self.samples[:sixth], self.samples[2 * sixth : 3 * sixth], self.samples[-sixth:])
        first, third, last = (round(statistics.median(it.rss for it in piece) / MIB, 1) for piece in pieces)
        return first, third, last

    def problems(self) -> list[str]:
        """What has grown."""
        found = []
        _, third, last = self.medians()
        if last > third * (1 + self.share) + self.slack_mib:
            found.append(f"memory grew from {third:.1f} to {last:.1f} MiB")
        before, after = self.at_rest[0], self.at_rest[-1]
        if after.fds > before.fds + self.slack_fds:
            found.append(f"descriptors at rest grew from {before.fds} to {after.fds}")
        if after.threads > before.threads + 4:
            found.append(f"threads at rest grew from {before.threads} to {after.threads}")
        return found
