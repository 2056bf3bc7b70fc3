"""The processes of one vLLM: front end, EngineCore, workers; and who maps a pool file."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.deadlines import deadline


@dataclass(frozen=True)
class Family:
    """The processes of one engine. `others` are helpers such as Python's resource tracker."""

    front_end: psutil.Process
    engine_core: psutil.Process
    workers: tuple[psutil.Process, ...]
    others: tuple[psutil.Process, ...]

    def all(self) -> tuple[psutil.Process, ...]:
        """Every process of the engine."""
        return (self.front_end, self.engine_core, *self.workers, *self.others)

    def pids(self) -> set[int]:
        """Their ids."""
        return {process.pid for process in self.all()}

    def survivors(self) -> list[psutil.Process]:
        """Those that still run. A process that got the id of a dead one is none of ours."""
        return [process for process in self.all() if runs(process)]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ""


def engine_cores(front_end: int) -> set[psutil.Process]:
    """All EngineCore processes below a front end, which may run several engines."""
    children = psutil.Process(front_end).children(recursive=True)
    return {child for child in children if "EngineCore" in _title(child)}


def family(front_end: int, engines: int = 1) -> Family:
    """Finds the children of a front end by the titles that vLLM gives them. Of several engines the first is told."""
    parent = psutil.Process(front_end)
    children = parent.children(recursive=True)
    cores = [child for child in children if "EngineCore" in _title(child)]
    workers = [child for child in children if "Worker" in _title(child)]
    if len(cores) != engines or not workers:
        titles = {child.pid: _title(child)[:60] for child in children}
        raise RuntimeError(f"cannot tell EngineCore and workers of process {front_end} apart: {titles}")
    known = [cores[0], *workers]
    others = tuple(child for child in children if child not in known)
    return Family(parent, cores[0], tuple(workers), others)


def runs(process: psutil.Process) -> bool:
    """Whether this very process exists and is more than a zombie."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def kill(process: psutil.Process) -> None:
    """SIGKILL, if it is still there."""
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return


def wait_until(done: Callable[[], bool], what: str, good_s: float = 60.0) -> None:
    """Polls until `done`. On a good machine it certainly is within `good_s`, here within the deadline for that."""
    patience_s = deadline(good_s)
    end = time.monotonic() + patience_s
    while not done():
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not within {patience_s:.0f} s")
        time.sleep(0.1)


def mappers(pool: Path) -> set[int]:
    """Ids of all processes that map a pool file, read from /proc: independent of what kvcellar says."""
    found = set()
    # By inode: a file that was removed and made anew has the same name and is another one.
    inode = str(pool.stat().st_ino)
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            maps = (entry / "maps").read_text()
        except OSError:
            continue
        if any(fields[4] == inode and fields[5:6] == [str(pool)] for fields in map(str.split, maps.splitlines())):
            found.add(int(entry.name))
    return found
