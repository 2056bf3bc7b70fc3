"""Real `kvcellar route` and real Envoy processes."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.deadlines import deadline
from tests.vllm.server import ANSWER_S, free_port

# On a good machine; see `deadline`.
READY_S = 60.0
STOP_S = 10.0
TYPES = "type.googleapis.com/envoy"


@dataclass
class Router:
    """A running router."""

    process: subprocess.Popen[bytes]
    http: str
    picker_port: int
    admin: httpx.Client
    client: httpx.Client
    log: Path

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's lines that carry these labels."""
        total = 0.0
        for line in self.admin.get("/metrics").text.splitlines():
            head, _, value = line.rpartition(" ")
            if head.split("{")[0] == name and all(f'{key}="{wanted}"' in head for key, wanted in labels.items()):
                total += float(value)
        return total

    def decisions(self) -> list[dict[str, Any]]:
        """The last decisions."""
        found: list[dict[str, Any]] = self.admin.get("/debug/decisions").json()
        return found

    def wait_engines(self, count: int) -> None:
        """Waits until so many engines may get requests."""
        end = time.monotonic() + deadline(READY_S)
        while True:
            rows = self.admin.get("/debug/engines").json()
            if sum(row["health"] == "healthy" and bool(row["models"]) for row in rows) == count:
                return
            if time.monotonic() > end:
                raise AssertionError(f"not {count} healthy engines: {rows}\n{self.log.read_text()}")
            time.sleep(0.05)


def wait_port(client: httpx.Client, path: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Waits for any HTTP answer."""
    end = time.monotonic() + deadline(READY_S)
    while True:
        with contextlib.suppress(httpx.TransportError):
            client.get(path)
            return
        if process.poll() is not None or time.monotonic() > end:
            raise AssertionError(f"it ended with {process.poll()}:\n{log.read_text()}")
        time.sleep(0.05)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a process as an operator would, then by force."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(deadline(STOP_S))
    process.kill()
    process.wait()


@contextlib.contextmanager
def open_router(work_dir: Path, *flags: str, name: str = "router", picker_port: int | None = None) -> Iterator[Router]:
    """Starts a router with both front ends."""
    http, admin, picker = free_port(), free_port(), picker_port or free_port()
    log = work_dir / f"{name}.log"
    command = [sys.executable, "-m", "kvcellar", "route", "--http", f"127.0.0.1:{http}"]
    command += ["--admin", f"127.0.0.1:{admin}", "--ext-proc", f"127.0.0.1:{picker}", "--scrape-ms", "100", *flags]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{http}"
    with (
        httpx.Client(base_url=f"http://127.0.0.1:{admin}", trust_env=False, timeout=deadline(READY_S)) as shown,
        httpx.Client(base_url=url, trust_env=False, timeout=deadline(ANSWER_S)) as client,
    ):
        try:
            wait_port(shown, "/healthz", process, log)
            yield Router(process, url, picker, shown, client, log)
        finally:
            stop(process)


def address(port: int) -> dict[str, Any]:
    """Envoy's form of a loopback address."""
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def cluster(name: str, port: int) -> dict[str, Any]:
    """A gRPC cluster with one address."""
    options = {"explicit_http_config": {"http2_protocol_options": {}}}
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": f"{deadline(1.0):.0f}s",
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                **options,
            }
        },
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(port)}}]}],
        },
    }


def envoy_config(port: int, admin: int, picker: int, body_mode: str) -> dict[str, Any]:
    """A gateway whose engines are named by the picker."""
    duplex, long = body_mode == "FULL_DUPLEX_STREAMED", f"{deadline(600.0):.0f}s"
    mode = {
        "request_header_mode": "SEND",
        "response_header_mode": "SEND",
        "request_body_mode": body_mode,
        "response_body_mode": body_mode if duplex else "STREAMED",
        "request_trailer_mode": "SEND" if duplex else "SKIP",
        "response_trailer_mode": "SEND" if duplex else "SKIP",
    }
    processor = {
        "@type": "type.googleapis.com/envoy.extensions.filters.http.ext_proc.v3.ExternalProcessor",
        "grpc_service": {"envoy_grpc": {"cluster_name": "picker"}, "timeout": long},
        "processing_mode": mode,
        "message_timeout": f"{deadline(30.0):.0f}s",
        "metadata_options": {"receiving_namespaces": {"untyped": ["envoy.lb"]}},
        "mutation_rules": {"allow_all_routing": True},
    }
    router = {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}
    manager = {
        "@type": f"{TYPES}.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "gateway",
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "engines", "timeout": long}}],
                }
            ]
        },
        "http_filters": [
            {"name": "envoy.filters.http.ext_proc", "typed_config": processor},
            {"name": "envoy.filters.http.router", "typed_config": router},
        ],
    }
    engines = {
        "name": "engines",
        "type": "ORIGINAL_DST",
        "lb_policy": "CLUSTER_PROVIDED",
        "connect_timeout": f"{deadline(2.0):.0f}s",
        "original_dst_lb_config": {"use_http_header": True, "http_header_name": "x-gateway-destination-endpoint"},
    }
    listener = {
        "name": "gateway",
        "address": address(port),
        "per_connection_buffer_limit_bytes": 32 << 20,
        "filter_chains": [
            {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        ],
    }
    return {
        "admin": {"address": address(admin)},
        "static_resources": {"listeners": [listener], "clusters": [engines, cluster("picker", picker)]},
    }


@contextlib.contextmanager
def open_envoy(work_dir: Path, picker: int, body_mode: str = "FULL_DUPLEX_STREAMED") -> Iterator[httpx.Client]:
    """Starts Envoy in front of a picker."""
    port, admin = free_port(), free_port()
    with run_envoy(work_dir, port, admin, envoy_config(port, admin, picker, body_mode)) as (client, _):
        yield client


@contextlib.contextmanager
def run_envoy(
    work_dir: Path, port: int, admin: int, made: dict[str, Any]
) -> Iterator[tuple[httpx.Client, httpx.Client]]:
    """Envoy with a configuration: what comes in at its gateway, and its admin interface."""
    config, log = work_dir / f"envoy-{port}.json", work_dir / f"envoy-{port}.log"
    config.write_text(json.dumps(made))
    binary = Path(sys.executable).with_name("envoy")
    command = [str(binary), "-c", str(config), "--use-dynamic-base-id", "--concurrency", "1", "-l", "warning"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    with (
        httpx.Client(base_url=f"http://127.0.0.1:{admin}", trust_env=False) as shown,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=deadline(ANSWER_S)) as client,
    ):
        try:
            wait_port(shown, "/ready", process, log)
            yield client, shown
        finally:
            stop(process)
