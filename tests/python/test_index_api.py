"""The index over HTTP: what comes in is wrong in every way, and the service goes on."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deadlines import deadline
from tests.python.index_server import IndexServer, index_server

JSON = {"content-type": "application/json"}
NOBODY = "tcp://127.0.0.1:9"


@pytest.fixture(scope="module")
def server() -> Iterator[IndexServer]:
    """An index of an engine that is not there."""
    with index_server("--engine", NOBODY, "--block-tokens", "4", "--body", "64KiB") as server:
        yield server


def test_an_empty_index_knows_nobody(server: IndexServer) -> None:
    """Answers before the first event."""
    answer = server.post("/v1/score", {"prompt": {"tokens": list(range(10))}})
    assert answer == {"block_tokens": 4, "blocks": 2, "engines": []}
    keys = server.post("/v1/keys", {"tokens": list(range(8))})["keys"]
    assert len(keys) == 2
    assert server.get(f"/v1/blocks/{keys[0]}")["holders"] == []
    assert server.get(f"/v1/blocks/{int(keys[0]):#x}")["key"] == keys[0]
    assert server.get("/v1/engines")["sources"][NOBODY]["connected"] is False
    assert server.request("GET", "/healthz")[0] == 503


def test_metrics_and_contract(server: IndexServer) -> None:
    """Metrics are text for Prometheus; every path of the OpenAPI file answers."""
    status, body = server.request("GET", "/metrics")
    assert status == 200
    assert b"kvcellar_index_memory_bytes_max 1073741824" in body
    contract = server.get("/openapi.json")
    for path, methods in contract["paths"].items():
        for method in methods:
            status, _ = server.request(method.upper(), path.replace("{key}", "1"), b"{}", JSON)
            assert status not in (404, 405, 500), f"{method} {path}: {status}"


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/score", b"", 400),
        ("/v1/score", b"{", 400),
        ("/v1/score", b"[" * 10_000, 422),
        ("/v1/score", b"\xff\xfe", 400),
        ("/v1/score", b"{}", 422),
        ("/v1/score", b'{"prompt": {"tokens": [-1]}}', 422),
        ("/v1/score", b'{"prompt": {"tokens": [4294967296]}}', 422),
        ("/v1/score", b'{"prompt": {"tokens": "1,2"}}', 422),
        ("/v1/score", b'{"prompt": {"tokens": [], "modle": "m"}}', 422),
        ("/v1/score", b'{"prompt": {"tokens": []}, "weights": {"hbm": 1}}', 400),
        ("/v1/score", b'{"prompt": {"tokens": []}, "weights": {"gpu": 2}}', 400),
        ("/v1/expect", b'{"prompt": {"tokens": []}, "engine": "x"}', 404),
        ("/v1/expect", b'{"prompt": {"tokens": []}, "engine": "x", "ttl_ms": 999999}', 400),
        ("/v1/score", b" " * 70_000, 413),
    ],
)
def test_wrong_requests_get_4xx_and_a_reason(server: IndexServer, path: str, body: bytes, status: int) -> None:
    """Never a 500, and the connection is answered."""
    found, answer = server.request("POST", path, body, JSON)
    assert found == status, answer
    assert json.loads(answer)["error"]


def test_other_nonsense(server: IndexServer) -> None:
    """Wrong paths, methods, kinds of body, keys, and bytes that are no HTTP."""
    assert server.request("POST", "/v1/score", b"{}", {"content-type": "text/plain"})[0] == 415
    assert server.request("GET", "/v1/score")[0] == 405
    assert server.request("GET", "/v2")[0] == 404
    for key in ("x", "0x", "-1", "18446744073709551616", "%00"):
        assert server.request("GET", f"/v1/blocks/{key}")[0] == 400
    for raw in (b"\x00" * 100, b"GET / HTTP/9.9\r\n\r\n", b"POST /v1/score HTTP/1.1\r\nContent-Length: -5\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=deadline(10.0)) as line:
            line.sendall(raw)
            assert line.recv(1000)[:12] in (b"", b"HTTP/1.1 400", b"HTTP/1.0 400")
    assert server.post("/v1/score", {"prompt": {"tokens": []}})["blocks"] == 0


def test_a_token_and_a_rate(tmp_path: Path) -> None:
    """Without the token nobody is answered but for health; beyond the rate nobody is."""
    secret = tmp_path / "token"
    secret.write_text("s3cret\n")
    with index_server("--engine", NOBODY, "--token-file", str(secret), "--requests-per-second", "5") as server:
        assert server.request("GET", "/v1/engines")[0] == 401
        assert server.request("GET", "/v1/engines", headers={"authorization": "Bearer s3cre"})[0] == 401
        assert server.request("GET", "/healthz")[0] == 503
        known = {"authorization": "Bearer s3cret"}
        statuses = [server.request("GET", "/v1/engines", headers=known)[0] for _ in range(30)]
        assert statuses[0] == 200
        assert 429 in statuses


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--engine"),
        (["--engine", "localhost:5557"], "scheme"),
        (["--engine", NOBODY, "--memory", "1MiB"], "memory"),
        (["--engine", NOBODY, "--memory", "lots"], "memory"),
        (["--engines-file", "/nonexistent"], "/nonexistent"),
        (["--engine", NOBODY, "--token-file", "/dev/null"], "token"),
    ],
)
def test_wrong_options_name_the_remedy(arguments: list[str], named: str) -> None:
    """Exit code 1, one line."""
    command = [sys.executable, "-m", "kvcellar", "index", "serve", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=deadline(30.0), check=False)
    assert done.returncode == 1
    assert named in done.stderr
