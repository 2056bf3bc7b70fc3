"""A real Kubernetes API server, with etcd below it and no nodes.

Objects are kept, watched and guarded, and nothing runs.
"""

import contextlib
import http.client
import json
import os
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.deadlines import deadline

# On a good machine; see `deadline`.
START_S = 60.0
STOP_S = 20.0
ANSWER_S = 30.0

ADMIN = "admin-token"
ROUTER = "router-token"
# The user whose token is `ROUTER`: it may do what a test lets it.
USER = "router"


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


@dataclass
class KubeServer:
    """The server, as its administrator sees it."""

    binaries: Path
    folder: Path
    port: int = field(default_factory=free_port)
    etcd_port: int = field(default_factory=free_port)
    peer_port: int = field(default_factory=free_port)
    server: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the API server, over what etcd holds."""
        key = self.folder / "accounts.key"
        if not key.exists():
            subprocess.run(["openssl", "genrsa", "-out", str(key), "2048"], check=True, capture_output=True)
            tokens = f"{ADMIN},admin,admin,system:masters\n{ROUTER},{USER},{USER},\n"
            (self.folder / "tokens.csv").write_text(tokens)
        command = [
            str(self.binaries / "kube-apiserver"),
            f"--etcd-servers=http://127.0.0.1:{self.etcd_port}",
            f"--secure-port={self.port}",
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            f"--cert-dir={self.folder / 'certificates'}",
            f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
            "--service-account-issuer=https://kubernetes.default.svc",
            "--service-cluster-ip-range=10.96.0.0/24",
            f"--token-auth-file={self.folder / 'tokens.csv'}",
            "--authorization-mode=RBAC",
            # Nobody makes service accounts here.
            "--disable-admission-plugins=ServiceAccount",
            "--endpoint-reconciler-type=none",
        ]
        with (self.folder / "server.log").open("ab") as log:
            self.server = subprocess.Popen(command, stdout=log, stderr=log)
        self._until_ready()

    def _until_ready(self) -> None:
        until = time.monotonic() + deadline(START_S)
        while True:
            with contextlib.suppress(OSError):
                if self.request("GET", "/readyz")[0] == 200:
                    return
            assert self.server is not None and self.server.poll() is None, self._log()
            assert time.monotonic() < until, self._log()
            time.sleep(0.2)

    def _log(self) -> str:
        return (self.folder / "server.log").read_text()[-2000:]

    def stop(self) -> None:
        """Stops the API server at once. etcd keeps what it holds."""
        assert self.server is not None
        self.server.kill()
        self.server.wait(deadline(STOP_S))

    def request(self, method: str, path: str, body: object = None, kind: str = "application/json") -> tuple[int, Any]:
        """Status and JSON answer of the administrator's request."""
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        line = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=deadline(ANSWER_S), context=context)
        try:
            headers = {"authorization": f"Bearer {ADMIN}", "content-type": kind}
            line.request(method, path, json.dumps(body) if body is not None else None, headers)
            answer = line.getresponse()
            text = answer.read()
            with contextlib.suppress(ValueError):
                return answer.status, json.loads(text)
            return answer.status, text.decode()
        finally:
            line.close()

    def make(self, path: str, value: object) -> None:
        """Makes an object."""
        status, answer = self.request("POST", path, value)
        assert status == 201, answer

    def change(self, path: str, value: object) -> None:
        """Changes fields of an object."""
        status, answer = self.request("PATCH", path, value, "application/merge-patch+json")
        assert status == 200, answer

    def remove(self, path: str) -> None:
        """Removes an object at once."""
        status, answer = self.request("DELETE", f"{path}?gracePeriodSeconds=0")
        assert status == 200, answer

    def kubeconfig(self, namespace: str) -> Path:
        """A file for `KUBECONFIG` of the user `USER`."""
        path = self.folder / "kubeconfig"
        cluster = {"server": f"https://127.0.0.1:{self.port}", "insecure-skip-tls-verify": True}
        made = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": USER, "user": {"token": ROUTER}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": USER, "namespace": namespace}}],
            "current-context": "test",
        }
        path.write_text(json.dumps(made))
        return path


@contextlib.contextmanager
def kube_server(binaries: Path, folder: Path) -> Iterator[KubeServer]:
    """Starts etcd and an API server over it, and stops both afterwards."""
    kube = KubeServer(binaries, folder)
    client, peer = (f"http://127.0.0.1:{port}" for port in (kube.etcd_port, kube.peer_port))
    command = [str(binaries / "etcd"), "--data-dir", str(folder / "etcd"), "--unsafe-no-fsync", "--log-level", "error"]
    command += ["--listen-client-urls", client, "--advertise-client-urls", client]
    command += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]
    command += ["--initial-cluster", f"default={peer}"]
    with (folder / "etcd.log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as etcd:
        try:
            kube.start()
            yield kube
        finally:
            if kube.server is not None and kube.server.poll() is None:
                kube.stop()
            etcd.kill()
            etcd.wait(deadline(STOP_S))
            shutil.rmtree(folder / "etcd", ignore_errors=True)


def programs() -> Path | None:
    """Where the programs are, if they are."""
    named = os.environ.get("KVCELLAR_TEST_KUBE")
    return Path(named) if named else None
