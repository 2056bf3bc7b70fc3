"""An Envoy as gateways of the Gateway API inference extension set it up.

It knows the pool's members, takes the one that the picker names in metadata, tries the next one named where that fails,
and says which one it was.

For tests its clients choose the subset that a gateway would choose, and its answers show the metadata of their request.
"""

import base64
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.deadlines import deadline
from tests.vllm.router import TYPES, address, cluster, envoy_config, run_envoy
from tests.vllm.server import free_port

DESTINATION = "x-gateway-destination-endpoint"
SUBSET_TEXT, SUBSET_LIST = "x-test-subset", "x-test-subset-list"
# Of an answer: metadata of `envoy.lb`, and of `kvcellar`.
ENDPOINT, SERVED, DECISION = "x-seen-endpoint", "x-seen-served", "x-seen-decision"
# What its health checks ask the picker for.
HEALTH_NAMES = ("", "readiness", "inference-extension", "envoy.service.ext_proc.v3.ExternalProcessor", "liveness")
UNKNOWN_HEALTH_NAME = "another"
# Of their clusters; it is also the authority that is asked for.
HEALTH_PREFIX = "health-"


def field(number: int, payload: bytes) -> bytes:
    """A field of a Protobuf message, with fewer than 16 KiB in it."""
    size = len(payload)
    length = bytes([size]) if size < 0x80 else bytes([size & 0x7F | 0x80, size >> 7])
    return bytes([number << 3 | 2]) + length + payload


def listed(texts: Sequence[str]) -> str:
    """A list of texts as `google.protobuf.Value`, in Base64."""
    values = b"".join(field(1, field(3, text.encode())) for text in texts)
    return base64.b64encode(field(6, values)).decode()


@dataclass
class Gateway:
    """One that runs."""

    client: httpx.Client
    admin: httpx.Client

    def health(self) -> dict[str, str]:
        """What each health check of the picker found, by the name that it asks for."""
        clusters = self.admin.get("/clusters", params={"format": "json"}).json()["cluster_statuses"]
        checks = [it for it in clusters if it["name"].startswith(HEALTH_PREFIX)]
        states = ("pending_active_hc", "failed_active_health_check")
        found = {it["name"].removeprefix(HEALTH_PREFIX): it["host_statuses"][0]["health_status"] for it in checks}
        return {name: next((it for it in states if status.get(it)), "serving") for name, status in found.items()}


def metadata_at(space: str, key: str) -> dict[str, Any]:
    """A place in metadata."""
    return {"key": space, "path": [{"key": key}]}


def policy(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """A load balancing policy."""
    kind = "".join(part.capitalize() for part in name.split("_"))
    typed = {"@type": f"{TYPES}.extensions.load_balancing_policies.{name}.v3.{kind}", **config}
    return {
        "policies": [
            {"typed_extension_config": {"name": f"envoy.load_balancing_policies.{name}", "typed_config": typed}}
        ]
    }


def pool(ports: Sequence[int]) -> dict[str, Any]:
    """The engines."""
    chosen = {
        "override_host_sources": [{"metadata": metadata_at("envoy.lb", DESTINATION)}],
        "selected_host_key": metadata_at("envoy.lb", f"{DESTINATION}-served"),
        "fallback_policy": policy("round_robin", {}),
    }
    endpoints = [{"endpoint": {"address": address(port)}} for port in ports]
    return {
        "name": "engines",
        "type": "STATIC",
        "connect_timeout": f"{deadline(2.0):.0f}s",
        "load_balancing_policy": policy("override_host", chosen),
        "load_assignment": {"cluster_name": "engines", "endpoints": [{"lb_endpoints": endpoints}]},
    }


def subset_filter() -> dict[str, Any]:
    """What a test says of the subset becomes metadata."""
    told = {"metadata_namespace": "envoy.lb.subset_hint", "key": f"{DESTINATION}-subset"}
    kinds = {SUBSET_TEXT: {"type": "STRING"}, SUBSET_LIST: {"type": "PROTOBUF_VALUE", "encode": "BASE64"}}
    rules = [
        {"header": header, "on_header_present": {**told, **kind}, "remove": True} for header, kind in kinds.items()
    ]
    typed = {"@type": f"{TYPES}.extensions.filters.http.header_to_metadata.v3.Config", "request_rules": rules}
    return {"name": "envoy.filters.http.header_to_metadata", "typed_config": typed}


def health_check(name: str, picker: int) -> dict[str, Any]:
    """A cluster that does nothing but to ask the picker for its health."""
    often = f"{deadline(0.2):.1f}s"
    check = {
        "timeout": f"{deadline(2.0):.0f}s",
        "interval": often,
        "no_traffic_interval": often,
        "healthy_threshold": 1,
        "unhealthy_threshold": 1,
        "grpc_health_check": {"service_name": name},
    }
    return {**cluster(f"{HEALTH_PREFIX}{name}", picker), "health_checks": [check]}


def gateway_config(port: int, admin: int, picker: int, body_mode: str, engines: Sequence[int]) -> dict[str, Any]:
    """The plain gateway's configuration with everything above."""
    config = envoy_config(port, admin, picker, body_mode)
    resources = config["static_resources"]
    checks = [health_check(name, picker) for name in (*HEALTH_NAMES, UNKNOWN_HEALTH_NAME)]
    resources["clusters"] = [pool(engines), cluster("picker", picker), *checks]
    manager = resources["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    manager["http_filters"][0]["typed_config"]["metadata_options"] = {
        "forwarding_namespaces": {"untyped": ["envoy.lb", "envoy.lb.subset_hint"]},
        "receiving_namespaces": {"untyped": ["envoy.lb", "kvcellar"]},
    }
    manager["http_filters"].insert(0, subset_filter())
    shown = {ENDPOINT: f"envoy.lb:{DESTINATION}", SERVED: f"envoy.lb:{DESTINATION}-served", DECISION: "kvcellar"}
    host = manager["route_config"]["virtual_hosts"][0]
    host["response_headers_to_add"] = [
        {"header": {"key": name, "value": f"%DYNAMIC_METADATA({what})%"}} for name, what in shown.items()
    ]
    host["routes"][0]["route"]["retry_policy"] = {"retry_on": "gateway-error,connect-failure", "num_retries": 1}
    return config


@contextlib.contextmanager
def open_gateway(work_dir: Path, picker: int, body_mode: str, engines: Sequence[int]) -> Iterator[Gateway]:
    """Starts one in front of engines at these ports."""
    port, admin = free_port(), free_port()
    with run_envoy(work_dir, port, admin, gateway_config(port, admin, picker, body_mode, engines)) as (client, shown):
        yield Gateway(client, shown)
