"""Progress on the terminal; plain lines where there is none."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

PLAIN_EVERY_SECONDS = 15.0


class Phase:
    """`with Phase(console, "title", total)`: call `advance` once per finished request."""

    def __init__(self, console: Console, title: str, total: int) -> None:
        self._console = console
        self._title = title
        self._total = total
        self._done = 0
        self._started = time.monotonic()
        self._printed = self._started
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task(title, total=total)

    def __enter__(self) -> "Phase":
        if self._bar is not None:
            self._bar.start()
        else:
            self._console.print(f"{self._title} ...")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        else:
            self._console.print(
                f"{self._title}: {self._done} of {self._total} in {time.monotonic() - self._started:.0f} s"
            )

    def advance(self) -> None:
        """One request is done."""
        self._done += 1
        if self._bar is not None:
            self._bar.advance(self._task)
        elif time.monotonic() - self._printed > PLAIN_EVERY_SECONDS:
            self._printed = time.monotonic()
            self._console.print(f"{self._title} ... {self._done} of {self._total}")
