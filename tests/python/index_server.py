"""A running `kvcellar index serve` on a free loopback port."""

import contextlib
import http.client
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.deadlines import deadline

# On a good machine; see `deadline`.
START_S = 30.0
ANSWER_S = 30.0
STOP_S = 15.0


@dataclass
class IndexServer:
    """The service and what it says."""

    process: subprocess.Popen[str]
    port: int = 0
    log: list[str] = field(default_factory=list)

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Status and body of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=deadline(ANSWER_S))
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def get(self, path: str) -> Any:
        """A JSON answer."""
        status, body = self.request("GET", path)
        assert status == 200, (status, body)
        return json.loads(body)

    def post(self, path: str, value: object) -> Any:
        """A JSON answer to a JSON question."""
        status, body = self.request("POST", path, json.dumps(value).encode(), {"content-type": "application/json"})
        assert status == 200, (status, body)
        return json.loads(body)


@contextlib.contextmanager
def index_server(*arguments: str) -> Iterator[IndexServer]:
    """Starts the service with these arguments and stops it afterwards.

    Raises:
        AssertionError: it did not start, or did not stop when asked to.

    """
    command = [sys.executable, "-m", "kvcellar", "index", "serve", "--listen", "127.0.0.1:0", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        server = IndexServer(process)
        ready = threading.Event()

        def listen() -> None:
            for line in process.stderr or ():
                server.log.append(line.rstrip())
                found = re.search(r"index at http://127\.0\.0\.1:(\d+)", line)
                if found:
                    server.port = int(found.group(1))
                    ready.set()
            ready.set()

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        try:
            assert ready.wait(deadline(START_S)) and server.port, f"it did not start: {server.log}"
            yield server
            assert process.poll() is None, f"it died: {server.log}"
        finally:
            process.terminate()
            try:
                process.wait(deadline(STOP_S))
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        assert process.returncode == 0, server.log
