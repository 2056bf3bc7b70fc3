"""What the documentation and the dashboard take for metrics is what a running index and a running router export.

The engine's own metrics are on vLLM's `/metrics`: tests/vllm/test_metrics.py scrapes those.
"""

import contextlib
import http.client
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence

import pytest
from docs_lib import declared

from tests.deadlines import deadline
from tests.python.index_server import ANSWER_S, START_S, STOP_S, index_server

NOBODY = "127.0.0.1:9"
# As the exposition format names them: a counter's family is without its ending.
FAMILY = re.compile(r"^# TYPE (\w+) (\w+)$", re.MULTILINE)


def families(text: str) -> dict[str, str]:
    """Name and kind of every family in a scrape."""
    return dict(FAMILY.findall(text))


def check(scraped: dict[str, str], metrics: Sequence[declared.Metric]) -> None:
    """A scrape holds what is declared, and nothing else. Families with labels show once they have a value."""
    known = {metric.name: metric.kind for metric in metrics}
    assert scraped.items() <= known.items()
    assert {metric.name for metric in metrics if not metric.labels} <= scraped.keys()


@contextlib.contextmanager
def admin_of_a_router() -> Iterator[str]:
    """The admin address of a router whose only engine is not there."""
    command = [sys.executable, "-m", "kvcellar", "route", "--http", "127.0.0.1:0", "--admin", "127.0.0.1:0"]
    with subprocess.Popen([*command, "--engine", f"http://{NOBODY}"], stderr=subprocess.PIPE, text=True) as process:
        found: list[str] = []
        ready = threading.Event()

        def listen() -> None:
            for line in process.stderr or ():
                found.extend(re.findall(r"admin at http://(\S+)", line))
                if found:
                    ready.set()
            ready.set()

        threading.Thread(target=listen, daemon=True).start()
        try:
            assert ready.wait(deadline(START_S)) and found, "it did not start"
            yield found[0]
        finally:
            process.terminate()
            process.wait(deadline(STOP_S))


def test_an_index_exports_what_is_declared() -> None:
    with index_server("--engine", f"tcp://{NOBODY}") as server:
        status, body = server.request("GET", "/metrics")
    assert status == 200
    check(families(body.decode()), declared.index())


def test_a_router_exports_what_is_declared() -> None:
    with admin_of_a_router() as address:
        connection = http.client.HTTPConnection(address, timeout=deadline(ANSWER_S))
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
    assert answer.status == 200
    check(families(text), declared.route())


@pytest.mark.parametrize("kind", ["unknown", "gauge"])
def test_another_metric_in_a_scrape_is_noticed(kind: str) -> None:
    scraped = {metric.name: metric.kind for metric in declared.index()}
    check(scraped, declared.index())
    with pytest.raises(AssertionError):
        check({**scraped, "kvcellar_index_batches": kind}, declared.index())
