"""Tenants of one real engine: what is guaranteed stays, whatever others store; pins hold."""

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.vllm.places import temporary_pool_dir
from tests.vllm.prompts import prompt
from tests.vllm.server import BLOCK_TOKENS, Server, open_server
from tests.vllm.sizes import kv_mib

SALT = "the-quiet-tenants-salt"
TENANTS = {"quiet": {"guaranteed": "50%", "cache_salt": SALT}, "busy": {"limit": "30%"}}
BLOCKS = 10


@pytest.fixture(scope="module")
def server(vllm_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a small pool: about 90 blocks."""
    cellar = {"dram_size": kv_mib(64), "namespace_salt": "tenants", "tenants": TENANTS}
    work_dir = tmp_path_factory.mktemp("tenants")
    with temporary_pool_dir() as pool_dir, open_server(work_dir, pool_dir, cellar=cellar) as server:
        yield server


def ask(server: Server, tokens: list[int], *, salt: str | None = None, **controls: object) -> int:
    """One request. Returns how many of its prompt's tokens were cached."""
    body: dict[str, Any] = {"model": "model", "prompt": tokens, "max_tokens": 1, "temperature": 0}
    if salt is not None:
        body["cache_salt"] = salt
    if controls:
        body["kv_transfer_params"] = {"kvcellar": controls}
    response = server.client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return int((response.json()["usage"]["prompt_tokens_details"] or {}).get("cached_tokens") or 0)


def forget_gpu(server: Server) -> None:
    """All copies have ended, and vLLM's own cache is empty."""
    server.settle()
    assert server.reset()


def blocks_of(server: Server, tenant: str) -> float:
    """What a tenant holds in memory, as an operator sees it."""
    return server.settle().cellar("tenant_blocks", tenant=tenant, tier="dram")


def test_a_busy_tenant_takes_nothing_that_is_guaranteed(server: Server, seed: int) -> None:
    random = Random(f"tenants-{seed}")
    prompts = [prompt(random, BLOCKS * BLOCK_TOKENS) for _ in range(4)]
    for tokens in prompts:
        ask(server, tokens, salt=SALT)
    assert blocks_of(server, "quiet") == 4 * BLOCKS
    slots = server.metrics().cellar("pool_slots", state="total")
    for _ in range(20):
        ask(server, prompt(random, BLOCKS * BLOCK_TOKENS), tenant="busy")
        assert server.metrics().cellar("tenant_blocks", tenant="busy", tier="dram") <= slots * 0.3
    for _ in range(20):
        ask(server, prompt(random, BLOCKS * BLOCK_TOKENS))
    assert blocks_of(server, "quiet") == 4 * BLOCKS
    forget_gpu(server)
    before = server.metrics().cellar("tenant_hit_tokens_total", tenant="quiet", tier="dram")
    # One token is computed always, so the last block may be.
    found = sum(ask(server, tokens, salt=SALT) for tokens in prompts)
    assert found >= 4 * (BLOCKS - 1) * BLOCK_TOKENS
    grown = server.settle().cellar("tenant_hit_tokens_total", tenant="quiet", tier="dram") - before
    assert grown == found
    assert server.metrics().cellar("tenant_evicted_blocks_total", tenant="busy") > 0


def test_the_name_comes_before_the_salt(server: Server, seed: int) -> None:
    tokens = prompt(Random(f"name-{seed}"), BLOCKS * BLOCK_TOKENS)
    before = server.settle().cellar("tenant_miss_tokens_total", tenant="busy")
    ask(server, tokens, salt=SALT, tenant="busy")
    assert server.settle().cellar("tenant_miss_tokens_total", tenant="busy") == before + BLOCKS * BLOCK_TOKENS


def test_a_pinned_prompt_outlives_what_others_store(server: Server, seed: int) -> None:
    random = Random(f"pin-{seed}")
    tokens = prompt(random, BLOCKS * BLOCK_TOKENS)
    ask(server, tokens, pin="1h")
    assert server.settle().cellar("pinned_blocks") == BLOCKS
    for _ in range(30):
        ask(server, prompt(random, BLOCKS * BLOCK_TOKENS))
    forget_gpu(server)
    assert ask(server, tokens) >= (BLOCKS - 1) * BLOCK_TOKENS
    # A quarter of what is guaranteed to nobody is soon pinned.
    for _ in range(4):
        ask(server, prompt(random, BLOCKS * BLOCK_TOKENS), pin="1h")
    counted = server.settle()
    assert counted.cellar("pins_refused_total") > 0
    assert counted.cellar("pinned_blocks") <= counted.cellar("pool_slots", state="total") * 0.5 * 0.25


@pytest.mark.parametrize("wish", [{"pin": "forever"}, {"tenant": 7}])
def test_a_wish_that_is_not_understood_leaves_its_request_out(server: Server, seed: int, wish: dict[str, Any]) -> None:
    before = server.settle().cellar("left_out_requests_total")
    ask(server, prompt(Random(f"wish-{wish}-{seed}"), 2 * BLOCK_TOKENS), **wish)
    assert server.settle().cellar("left_out_requests_total") == before + 1


def test_wrong_tenants_end_the_start_with_their_name(vllm_installed: None, tmp_path: Path) -> None:
    """Before the model is loaded."""
    tenants = {"acme": {"guaranteed": "60%", "limit": "50%"}}
    with (
        temporary_pool_dir() as pool_dir,
        pytest.raises(RuntimeError, match=r"tenants\.acme\.limit"),
        open_server(tmp_path, pool_dir, cellar={"tenants": tenants}),
    ):
        pass
