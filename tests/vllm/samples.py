"""What directories take while something runs: read every 50 ms, from the file system alone."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.vllm.mounts import taken

EVERY_S = 0.05


@dataclass
class Samples:
    """The most bytes that were ever seen below each directory, and those of a directory that may not be passed."""

    bounds: dict[Path, int]
    most: dict[Path, int] = field(default_factory=dict)
    count: int = 0
    problem: Exception | None = None
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    _look: Callable[[Path], int] = taken

    def __enter__(self) -> Self:
        """Begins."""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def _run(self) -> None:
        try:
            while not self._stop.wait(EVERY_S):
                self.look()
        except OSError as problem:
            self.problem = problem

    def look(self) -> None:
        """One look at all of them."""
        for directory in self.bounds:
            self.most[directory] = max(self.most.get(directory, 0), self._look(directory))
        self.count += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Ends, with a last look."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if error is None:
            self.look()

    def assert_within(self) -> None:
        """No directory ever took more than it may, and each took something."""
        assert self.problem is None, f"the sampling ended: {self.problem}"
        assert self.count > 1
        for directory, bound in self.bounds.items():
            assert 0 < self.most[directory] <= bound, f"{directory}: {self.most[directory]} bytes, allowed {bound}"
