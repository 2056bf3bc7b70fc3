"""`kvcellar route` as a child process, in one of the ways."""

import http.client
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from quickstart_lib.failure import QuickstartError
from quickstart_lib.fleet.measurements import PRECISE, ROUND_ROBIN, Way
from quickstart_lib.metrics import Metrics
from quickstart_lib.server import Server, free_port

READY_SECONDS_MAX = 60.0
IDS_MADE_HERE = "made here"


def flags(way: Way, policy: str, model: Path) -> list[str]:
    """What makes this way. `policy`: of those that know prefixes."""
    weighing = "round-robin" if way is ROUND_ROBIN else policy
    tokenizer = ["--tokenizer", str(model)] if way is PRECISE else []
    return ["--mode", way.prefix_from, "--policy", weighing, *tokenizer]


def command(way_flags: list[str], port: int, admin: int, engines: list[str]) -> list[str]:
    """The `kvcellar route` command line. `engines`: values of `--engine`."""
    kvcellar = str(Path(sys.executable).with_name("kvcellar"))
    addresses = ["--http", f"127.0.0.1:{port}", "--admin", f"127.0.0.1:{admin}"]
    return [kvcellar, "route", *addresses, *way_flags, *(word for engine in engines for word in ("--engine", engine))]


class Router:
    """`with Router(...)`: inside, it knows all engines and their models; afterwards, it is gone."""

    def __init__(self, way: Way, policy: str, engines: list[str], model: Path, log: Path) -> None:
        self._way = way
        self._engines = len(engines)
        self._admin = free_port()
        self.port = free_port()
        line = command(flags(way, policy, model), self.port, self._admin, engines)
        self._server = Server(line, self._admin, log, _wait, name="kvcellar route", health="/readyz")

    def __enter__(self) -> "Router":
        self._server.__enter__()
        try:
            self._until(self._all_usable, f"did not find {self._engines} healthy engines")
            if self._way is PRECISE:
                self._until(lambda: IDS_MADE_HERE in self._log(), "did not find vLLM's token ids to be its own")
        except BaseException:
            self._server.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.__exit__(kind, error, trace)

    def counters(self) -> dict[str, float]:
        """Its counters, over all engines."""
        totals = Metrics(self._get("/metrics").decode()).with_prefix("kvcellar_route")
        return {name: value for name, value in totals.items() if "_engine_" not in name}

    def _all_usable(self) -> bool:
        rows: list[dict[str, Any]] = json.loads(self._get("/debug/engines"))
        usable = [row for row in rows if row["health"] == "healthy" and row["models"]]
        return len(usable) == self._engines

    def _log(self) -> str:
        return self._server.log.read_text(errors="replace")

    def _until(self, holds: Callable[[], bool], failure: str) -> None:
        deadline = time.monotonic() + READY_SECONDS_MAX
        while not holds():
            if not self._server.runs or time.monotonic() > deadline:
                raise QuickstartError(f"kvcellar route {failure}.\n{self._server.tail()}")
            time.sleep(0.1)

    def _get(self, path: str) -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self._admin, timeout=10.0)
        try:
            connection.request("GET", path)
            return connection.getresponse().read()
        finally:
            connection.close()


def _wait(_seconds: float) -> None:
    """It is there in a moment: nothing to show."""
