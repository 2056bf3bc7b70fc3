"""As in a container: little shared memory, no io_uring, no populating of mappings. It starts, says so, and serves."""

import os
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.deadlines import deadline
from tests.vllm import tiny_models
from tests.vllm.answers import assert_identical
from tests.vllm.confined import GROUP_ROOM_BYTES, SHARED_BYTES
from tests.vllm.engine_process import start_engine
from tests.vllm.engines import Engine
from tests.vllm.places import temporary_disk_dir
from tests.vllm.processes import wait_until
from tests.vllm.prompts import prompt
from tests.vllm.references import from_us
from tests.vllm.said import warnings
from tests.vllm.server import BLOCK_TOKENS, KV_BLOCKS, Server, open_server
from tests.vllm.sizes import MIB, kv_bytes

PROMPT_TOKENS = 8 * BLOCK_TOKENS + 5
HIT_TOKENS = 8 * BLOCK_TOKENS
ANSWER_TOKENS = 4
WISH = "1GiB"

pytestmark = [
    pytest.mark.soak,
    pytest.mark.usefixtures("vllm_installed"),
    pytest.mark.timeout(deadline(3600)),
    pytest.mark.skipif(os.geteuid() != 0, reason="a mount namespace of its own can be made by root only"),
]


def confined(limits: str) -> list[str]:
    """What runs a command with these limits."""
    return [sys.executable, str(Path(__file__).with_name("confined.py")), limits]


def reset(server: Server) -> None:
    """Empties vLLM's own cache."""
    wait_until(server.reset, "the reset of vLLM's cache")


def test_a_server_in_a_container_says_what_is_small_and_serves_from_both_tiers(tmp_path: Path, seed: int) -> None:
    """The worker and EngineCore talk through shared memory too, which the pool must leave some of."""
    rng = random.Random(f"container-{seed}")
    # More than memory holds: the first of them must come from disk.
    prompts = [prompt(rng, PROMPT_TOKENS) for _ in range(12)]
    limits = confined("small-shm,no-ring,no-populate-einval")
    with temporary_disk_dir() as disk:
        cellar = {
            "pool_dir": None,
            "dram_size": WISH,
            "nvme_dir": str(disk),
            "nvme_size": kv_bytes(512 * MIB),
            "write_through": True,
            "verify_loads": True,
        }
        with open_server(tmp_path, tmp_path, cellar=cellar, before=limits) as server:
            said = warnings(server.log, "dram_size")
            assert said and all("--shm-size" in line for line in said), said
            assert any(f"{SHARED_BYTES >> 20}" in line or "free shared memory" in line for line in said), said
            assert warnings(server.log, "threads"), "nothing said that io_uring is refused"
            references = []
            for tokens in prompts:
                server.complete(tokens, ANSWER_TOKENS)
                references.append(server.complete(tokens, ANSWER_TOKENS))
                server.settle()
            assert references[0].cached_tokens == HIT_TOKENS
            wait_until(lambda: server.settle().cellar("nvme_writing") == 0, "writes")
            for tokens, reference in zip(prompts[::-1], references[::-1], strict=True):
                reset(server)
                answer = server.complete(tokens, ANSWER_TOKENS)
                assert answer.cached_tokens == HIT_TOKENS
                assert_identical(reference, answer, "from us")
            # A full batch: the largest messages that this server sends its worker.
            for _ in range(20):
                server.complete(prompt(rng, BLOCK_TOKENS * (KV_BLOCKS - 3) // 2), 2)
            after = server.settle()
            print(f"{after.slots('total')} slots, {after.hit_tokens} tokens from memory, said: {said}")
            assert after.hit_tokens > 0
            assert after.cellar("hit_tokens_total", tier="nvme") > 0
            assert after.cellar("nvme_io_uring") == 0
            assert not after.leftovers()
            assert server.process.poll() is None


@pytest.mark.parametrize("errno", ["einval", "eperm"])
def test_an_engine_in_a_small_control_group_says_so_and_serves(tmp_path: Path, errno: str, seed: int) -> None:
    """The group's files are made up: what is tested is that they are read, bound the pool, and are named."""
    model = tiny_models.llama(tmp_path / "llama")
    rng = random.Random(f"group-{seed}")
    prompts = [prompt(rng, PROMPT_TOKENS, 0, tiny_models.VOCABULARY - 1) for _ in range(3)]
    options: dict[str, Any] = {"model": model, "skip_tokenizer_init": True, "kv_cache_memory_bytes": kv_bytes(16 * MIB)}
    cellar = {"pool_dir": None, "dram_size": WISH, "verify_loads": True}
    limits = confined(f"small-shm,small-group,no-ring,no-populate-{errno}")
    with start_engine(tmp_path, tmp_path, cellar=cellar, before=limits, **options) as engine:
        engine.wait_ready()
        said = [line for line in warnings(engine.log, "dram_size") if "control group" in line]
        assert len(said) == 1 and "--memory" in said[0], engine.log_tail()
        for tokens in prompts:
            engine.call(Engine.complete, tokens, 1)
        for tokens in prompts:
            hit, right = engine.call(from_us, tokens, ANSWER_TOKENS)
            assert right and hit == HIT_TOKENS, f"{hit} tokens"
        after = engine.call(Engine.settle)
        assert not after.leftovers()
        assert after.slots("total") > 0
        print(f"{after.slots('total')} slots in {GROUP_ROOM_BYTES}; said: {said[0]}")
