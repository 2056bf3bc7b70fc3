"""Prefill here, decode there, by the router: two real engines with NIXL between them, and one without it."""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.deadlines import deadline
from tests.vllm import nixl
from tests.vllm.places import temporary_pool_dir
from tests.vllm.router import Router, open_router
from tests.vllm.server import BLOCK_TOKENS, Server, free_port, open_server, transfer_config
from tests.vllm.sizes import kv_mib

PROMPT_TOKENS = 8 * BLOCK_TOKENS + 5
pytestmark = pytest.mark.timeout(deadline(1200))


@dataclass
class Pair:
    """Both servers."""

    prefill: Server
    decode: Server
    work_dir: Path

    def flags(self, *more: str) -> list[str]:
        """How a router finds them."""
        prefill = f"name=prefill,url={self.prefill.url},role=prefill"
        decode = f"name=decode,url={self.decode.url},role=decode"
        return ["--engine", prefill, "--engine", decode, "--prefill-tokens", str(2 * BLOCK_TOKENS), *more]

    def computed(self) -> tuple[float, float]:
        """Prompt tokens that each has computed itself."""
        found = []
        for server in (self.prefill, self.decode):
            metrics = server.metrics()
            found.append(metrics.value("vllm:prompt_tokens_total") - metrics.value("vllm:prompt_tokens_cached_total"))
        return found[0], found[1]


@pytest.fixture(scope="module")
def pair(vllm_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """A prefill and a decode server, with NIXL and KV Cellar in both."""
    if (problem := nixl.why_not()) is not None:
        pytest.skip(f"NIXL cannot run here: {problem}")
    work_dir = tmp_path_factory.mktemp("two-steps")
    # NIXL's threads never rest: each engine has a core of its own, or they starve each other.
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < len(nixl.ROLES):
        pytest.skip("two engines with NIXL need two cores")
    with temporary_pool_dir() as pool_dir, ExitStack() as ends:
        servers = {}
        for role, core in zip(nixl.ROLES, cores, strict=False):
            # Engines of one directory share `dram_size`.
            (own_dir := pool_dir / role).mkdir(mode=0o700)
            ours = transfer_config({"pool_dir": str(own_dir), "dram_size": kv_mib(32), "namespace_salt": role})
            transfer = nixl.beside(role, [nixl.connector(role), ours], kv_load_failure_policy="recompute")
            env = {
                "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
                "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
                "VLLM_CPU_OMP_THREADS_BIND": str(core),
                "UCX_TLS": "tcp,sm,self",
                "UCX_NET_DEVICES": "lo",
            }
            more = ["--kv-transfer-config", json.dumps(transfer)]
            servers[role] = ends.enter_context(open_server(work_dir, own_dir, cellar={}, name=role, more=more, env=env))
        yield Pair(servers["prefill"], servers["decode"], work_dir)


def body_of(random: Random, tokens: int = PROMPT_TOKENS) -> dict[str, Any]:
    """A prompt that nobody has seen."""
    prompt = [random.randrange(100, 40_000) for _ in range(tokens)]
    return {"model": "model", "prompt": prompt, "max_tokens": 6, "temperature": 0, "ignore_eos": True}


def text_of(router: Router, body: dict[str, Any], *, stream: bool) -> str:
    """The whole answer."""
    response = router.client.post("/v1/completions", json={**body, "stream": stream})
    assert response.status_code == 200, response.text
    if not stream:
        return str(response.json()["choices"][0]["text"])
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return "".join(choice["text"] for line in lines[:-1] for choice in json.loads(line)["choices"])


def test_prompts_are_computed_by_the_prefill_engine(pair: Pair, tmp_path: Path, seed: int) -> None:
    random = Random(f"two-steps-{seed}")
    with open_router(tmp_path, *pair.flags()) as router:
        router.wait_engines(2)
        for stream in (False, True):
            body = body_of(random)
            before = pair.computed()
            text = text_of(router, body, stream=stream)
            after = pair.computed()
            assert after[0] - before[0] >= PROMPT_TOKENS - BLOCK_TOKENS, "the prefill engine computed nothing"
            assert after[1] - before[1] <= BLOCK_TOKENS, "the decode engine computed the prompt"
            last = router.decisions()[-1]
            assert (last["engine"], last["prefill"], last["outcome"]) == ("decode", "prefill", "done")
            alone = pair.decode.client.post("/v1/completions", json=body).json()["choices"][0]["text"]
            assert text == alone
        assert router.metric("kvcellar_route_prefills_total", engine="prefill", outcome="done") == 2
        # Not worth two steps, or not to be split.
        for body in (body_of(random, BLOCK_TOKENS), {**body_of(random), "n": 2, "temperature": 0.5}):
            text_of(router, body, stream=False)
            assert router.decisions()[-1]["prefill"] is None
        assert router.metric("kvcellar_route_engine_in_flight") == 0


def test_a_sidecar_is_told_where_the_prompt_is_computed(pair: Pair, tmp_path: Path, seed: int) -> None:
    """vLLM itself ignores the header, so that the decode engine computes everything: what counts is that it came."""
    random = Random(f"sidecar-{seed}")
    with open_router(tmp_path, *pair.flags("--prefill-by", "sidecar")) as router:
        router.wait_engines(2)
        text_of(router, body_of(random), stream=False)
        assert router.decisions()[-1]["prefill"] == "prefill"
        assert router.metric("kvcellar_route_engine_in_flight") == 0


def test_without_the_prefill_engine_the_other_one_computes(pair: Pair, tmp_path: Path, seed: int) -> None:
    random = Random(f"gone-{seed}")
    gone = f"name=prefill,url=http://127.0.0.1:{free_port()},role=prefill"
    decode = f"name=decode,url={pair.decode.url},role=decode"
    with open_router(tmp_path, "--engine", gone, "--engine", decode, "--prefill-tokens", "1") as router:
        router.wait_engines(1)
        assert text_of(router, body_of(random), stream=False)
        assert router.decisions()[-1]["prefill"] is None
