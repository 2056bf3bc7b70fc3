"""Engines behind TLS, below a path, with an API key: as the router reaches them, and what it says where it cannot."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vllm.fake import Fake
from tests.vllm.processes import wait_until
from tests.vllm.router import open_router

KEY = "sk-of-the-engines"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Key and certificate of this machine's loopback address, which nobody has signed."""
    folder = tmp_path_factory.mktemp("tls")
    made = folder / "engine.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=engine"]
    # Nobody else's authority: those are not taken as an engine's own.
    command += ["-addext", "basicConstraints=critical,CA:FALSE"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(folder / "key"), "-out", str(folder / "cert")]
    subprocess.run(command, check=True, capture_output=True)
    made.write_text((folder / "key").read_text() + (folder / "cert").read_text())
    return made


@pytest.fixture(scope="module")
def engine(certificate: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fake]:
    """An engine as one that somebody else runs."""
    made = Fake("far", tmp_path_factory.mktemp("far"), tls=str(certificate), prefix="/tenants/a", api_key=KEY)
    try:
        made.start()
        yield made
    finally:
        made.close()


def flags(engine: Fake, work_dir: Path, *more: str) -> list[str]:
    """How a router finds it."""
    file = work_dir / "engines.json"
    file.write_text(json.dumps([engine.spec()]))
    return ["--engines-file", str(file), *more]


def test_an_engine_behind_tls_below_a_path_with_a_key(engine: Fake, certificate: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text(KEY + "\n")
    more = ["--engine-ca", str(certificate), "--engine-key", str(key), "--mode", "precise"]
    with open_router(tmp_path, *flags(engine, tmp_path, *more)) as router:
        router.wait_engines(1)
        chat = {"messages": [{"role": "user", "content": "What is a block"}], "max_tokens": 1}
        authorized = {"authorization": f"Bearer {KEY}"}
        assert router.client.post("/v1/chat/completions", json=chat, headers=authorized).status_code == 200
        assert router.decisions()[-1]["tokens_from"] == "remote", "its own question carried the key"
        # The router's key is not the client's.
        assert router.client.post("/v1/chat/completions", json=chat).status_code == 401
        assert KEY not in router.log.read_text()


def test_what_keeps_it_away_is_said(engine: Fake, certificate: Path, tmp_path: Path) -> None:
    with open_router(tmp_path, *flags(engine, tmp_path), name="unknown") as router:
        wait_until(lambda: "UnknownIssuer" in router.log.read_text(), "the reason")
        assert router.admin.get("/debug/engines").json()[0]["health"] == "unseen"
        refused = router.client.post("/v1/completions", json={"prompt": [1]})
        assert refused.status_code == 503, "nobody signed its certificate"
    with open_router(tmp_path, *flags(engine, tmp_path, "--engine-ca", str(certificate)), name="keyless") as router:
        wait_until(lambda: "wants a key" in router.log.read_text(), "the hint")
        assert router.admin.get("/debug/engines").json()[0]["health"] == "healthy"


@pytest.mark.parametrize("flag", ["--engine-ca", "--engine-key"])
def test_a_file_that_is_none_ends_the_start(engine: Fake, tmp_path: Path, flag: str) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    with (
        pytest.raises(AssertionError, match=flag.removeprefix("--")),
        open_router(tmp_path, *flags(engine, tmp_path, flag, str(empty))),
    ):
        pass
