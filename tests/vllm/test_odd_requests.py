"""Nothing that a client chooses can hurt the engine: thousands of odd requests, and the engine is as it was."""

import itertools
import os
import random
from collections.abc import Iterator

import pytest

from tests.deadlines import deadline, shrunk
from tests.vllm.odd_requests import NO_ANSWER, OddRequests, send_all
from tests.vllm.places import temporary_pool_dir
from tests.vllm.prompts import prompt
from tests.vllm.server import Server, open_server
from tests.vllm.sizes import kv_mib

# All of them in a campaign: KVCELLAR_ODD_REQUESTS=2000.
REQUESTS = int(os.environ.get("KVCELLAR_ODD_REQUESTS", "400"))
# Every request is answered once those before it are, and there are only so many: the least
# important ones come last.
ANSWER_S = 1800.0


@pytest.fixture(scope="module")
def server(vllm_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that takes priorities and tools, with an adapterless model."""
    cellar = {"dram_size": kv_mib(96), "namespace_salt": "odd"}
    more = ["--scheduling-policy", "priority", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    work_dir = tmp_path_factory.mktemp("odd")
    with temporary_pool_dir() as pool_dir, open_server(work_dir, pool_dir, cellar=cellar, more=more) as server:
        yield server


def test_an_id_of_five_thousand_bytes_is_served(server: Server) -> None:
    """Seen to end EngineCore."""
    body = {"prompt": [5] * 40, "max_tokens": 1, "request_id": "a" * 5_000}
    for headers in ({}, {"X-Request-Id": "b" * 5_000}):
        response = server.client.post("/v1/completions", json=body, headers=headers)
        assert response.status_code == 200, response.text
    assert server.process.poll() is None


def test_a_request_with_a_long_id_is_stored_and_loaded_like_any_other(server: Server, seed: int) -> None:
    tokens = prompt(random.Random(f"long-{seed}"), 100)
    body = {"prompt": tokens, "max_tokens": 1, "temperature": 0}
    for number in range(2):
        server.settle()
        assert server.reset()
        response = server.client.post("/v1/completions", json={**body, "request_id": f"{number}" * 4_500})
        assert response.status_code == 200, response.text
    assert response.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 96


@pytest.mark.parametrize(
    "wishes", [{"store": False, "bogus": 1}, {"store": "false"}, {"store": 0}, ["store"], {"store": None}, "no"]
)
def test_a_wish_not_to_store_fails_towards_not_storing(server: Server, seed: int, wishes: object) -> None:
    tokens = prompt(random.Random(f"wish-{wishes}-{seed}"), 100)
    before = server.settle().cellar("stored_blocks_total")
    body = {"prompt": tokens, "max_tokens": 1, "kv_transfer_params": {"kvcellar": wishes}}
    assert server.client.post("/v1/completions", json=body).status_code == 200
    after = server.settle()
    assert after.cellar("stored_blocks_total") == before
    assert after.cellar("left_out_requests_total") > 0


@pytest.mark.timeout(deadline(3600))
def test_thousands_of_odd_requests_leave_the_engine_as_it_was(server: Server, seed: int) -> None:
    rng = random.Random(f"odd-{seed}")
    requests = list(itertools.islice(OddRequests(rng), shrunk(REQUESTS, 100)))
    outcomes = send_all(server.url, requests, deadline(ANSWER_S))
    print(f"{len(requests)} requests, seed {seed}: {dict(outcomes)}")
    assert server.process.poll() is None, server.log_tail()
    assert outcomes["200"] > len(requests) // 4
    assert not [text for text in outcomes if text.startswith(NO_ANSWER)]
    assert outcomes["closed"] < len(requests) // 4
    metrics = server.settle()
    assert not metrics.leftovers()
    assert metrics.cellar("internal_errors_total") == 0
    assert metrics.cellar("in_service") == 1
    assert metrics.value("vllm:num_requests_running") == metrics.value("vllm:num_requests_waiting") == 0
    # vLLM answers some of these by itself with an error of its own (its front end cannot encode
    # lone surrogates); none of ours is among them.
    assert not [text for text in outcomes if "kvcellar" in text.lower() or "EngineCore" in text or "EngineDead" in text]
    tokens = prompt(rng, 100)
    server.complete(tokens, max_tokens=1)
    server.settle()
    assert server.reset()
    assert server.complete(tokens, max_tokens=1).cached_tokens == 96
