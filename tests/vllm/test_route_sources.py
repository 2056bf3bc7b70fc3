"""Engines are told who else holds a prompt in host memory: by a header for a sidecar, or in the body for vLLM itself.

vLLM's tier `p2p`, which fetches it then, needs a GPU; here its own parser reads what it would get.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest

from tests.vllm.fake import Fake
from tests.vllm.processes import wait_until
from tests.vllm.router import Router, open_envoy, open_router
from tests.vllm.soak_fleet import Fleet, open_fleet

HEADER = "x-kv-cache-source-host-port"
PROMPT_TOKENS = 600
BLOCK_TOKENS = 16
HELD_TOKENS = PROMPT_TOKENS // BLOCK_TOKENS * BLOCK_TOKENS
NEEDED_TOKENS = 256


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two engines with host tiers."""
    work_dir = tmp_path_factory.mktemp("sources")
    with open_fleet(work_dir, {name: Fake(name, work_dir, host_tier=True) for name in "ab"}) as made:
        yield made


def flags(fleet: Fleet, to: str) -> list[str]:
    """Of a router that gives requests to both in turn."""
    found = ["--engines-file", str(fleet.file), "--mode", "precise", "--policy", "round-robin"]
    return [*found, "--source-hints", to, "--source-tokens", str(NEEDED_TOKENS)]


@pytest.fixture(params=["proxy", "duplex", "buffered"])
def way(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[Router], httpx.Client]]:
    """Our own proxy, or Envoy in one of both modes."""
    opened: list[Any] = []

    def open_way(router: Router) -> httpx.Client:
        if request.param == "proxy":
            return router.client
        mode = "FULL_DUPLEX_STREAMED" if request.param == "duplex" else "BUFFERED"
        opened.append(open_envoy(tmp_path, router.picker_port, mode))
        client: httpx.Client = opened[-1].__enter__()
        return client

    try:
        yield open_way
    finally:
        for it in opened:
            it.__exit__(None, None, None)


def prompt_of(seed: str) -> list[int]:
    """A prompt that nobody has seen."""
    random = Random(seed)
    return [random.randrange(1, 40_000) for _ in range(PROMPT_TOKENS)]


def ask(client: httpx.Client, prompt: list[int], **more: object) -> str:
    """Sends a prompt with what no client may say; returns who answered."""
    body = {"prompt": prompt, "max_tokens": 2, "seed": 18446744073709551616, **more}
    answer = client.post("/v1/completions", content=json.dumps(body), headers={HEADER: "10.0.0.9:1"})
    assert answer.status_code == 200, answer.text
    return str(answer.headers["x-fake-engine"])


def saw(fleet: Fleet, name: str) -> tuple[dict[str, list[str]], dict[str, Any], str]:
    """Headers and body of an engine's last request."""
    state = fleet.engines[name].operator.get("/state").json()
    return state["last_headers"], json.loads(state["last_body"]), state["last_body"]


def check_none(fleet: Fleet, router: Router, name: str) -> None:
    """The last request was told of nobody."""
    headers, body, _ = saw(fleet, name)
    assert HEADER not in headers, "what a client says of it goes no further"
    assert "remote_kv_source" not in (body.get("kv_transfer_params") or {})
    assert router.decisions()[-1]["source"] is None


@pytest.mark.parametrize("to", ["sidecar", "engine"])
def test_who_computes_a_prompt_is_told_who_holds_it(
    fleet: Fleet, way: Callable[[Router], httpx.Client], tmp_path: Path, to: str
) -> None:
    with open_router(tmp_path, *flags(fleet, to)) as router:
        router.wait_engines(2)
        client = way(router)
        prompt = prompt_of(f"{tmp_path}")
        holder = ask(client, prompt)
        check_none(fleet, router, holder)
        other = next(name for name in fleet.engines if name != holder)
        # The events come a moment later; prompts that are too short for a hint find out.
        short = prompt[:NEEDED_TOKENS]

        def is_known() -> bool:
            ask(client, short)
            return max(row["held_tokens"] for row in router.decisions()[-1]["considered"]) > 0

        wait_until(is_known, "the events")
        if router.decisions()[-1]["engine"] == other:
            ask(client, short)
        assert ask(client, prompt) == other
        assert router.decisions()[-1]["source"] == holder
        headers, body, text = saw(fleet, other)
        assert "18446744073709551616" in text
        if to == "sidecar":
            assert headers[HEADER] == [f"127.0.0.1:{fleet.engines[holder].port}"]
            assert "kv_transfer_params" not in body
        else:
            assert HEADER not in headers
            source = body["kv_transfer_params"]["remote_kv_source"]
            assert (source["remote_host"], source["remote_port"]) == ("127.0.0.1", 5710)
            check_read_by_vllm(body["kv_transfer_params"])
        assert router.metric("kvcellar_route_sources_total", engine=holder) == 1
        # Who brings transfers of its own is left alone, and so is who holds the prompt now.
        ask(client, prompt_of("another"))
        for _ in fleet.engines:
            check_none(fleet, router, ask(client, prompt, kv_transfer_params={"kvcellar": {}}))


def check_read_by_vllm(params: dict[str, Any]) -> None:
    """vLLM's tier `p2p` finds in these parameters whom to ask."""
    manager = pytest.importorskip("vllm.v1.kv_offload.tiering.p2p.manager")
    source = manager._parse_source(params)
    assert source is not None and source.do_probe
    assert source.peer_id == "127.0.0.1:5710" and source.kv_request_id.startswith("kvcellar-")


def test_only_an_index_knows_tiers(tmp_path: Path) -> None:
    flags = ["--engine", "http://127.0.0.1:1", "--source-hints", "engine", "--mode", "approximate"]
    with pytest.raises(AssertionError, match="Add --mode precise"), open_router(tmp_path, *flags):
        pass
