"""As in a container: little shared memory, no io_uring, no populating of mappings. It starts, says so, and serves."""

import contextlib
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.deadlines import deadline
from tests.vllm import tiny_models
from tests.vllm.answers import Answer, assert_identical
from tests.vllm.engine_process import start_engine
from tests.vllm.engines import Engine
from tests.vllm.places import temporary_disk_dir
from tests.vllm.processes import wait_until
from tests.vllm.prompts import prompt
from tests.vllm.references import after_a_gpu_hit
from tests.vllm.said import warnings
from tests.vllm.server import BLOCK_TOKENS, KV_BLOCKS, open_server
from tests.vllm.sizes import MIB, kv_bytes

HIT_TOKENS = 31 * BLOCK_TOKENS
PROMPT_TOKENS = HIT_TOKENS + 5
ANSWER_TOKENS = 4
WISH = "1GiB"
# Blocks of the tiny model that fill any of these pools: the first of them must come from disk.
PROMPTS = 48

pytestmark = [
    pytest.mark.usefixtures("vllm_installed"),
    pytest.mark.timeout(deadline(3600)),
    pytest.mark.skipif(os.geteuid() != 0, reason="a mount namespace of its own can be made by root only"),
]


def confined(limits: str) -> list[str]:
    """What runs a command with these limits."""
    return [sys.executable, str(Path(__file__).with_name("confined.py")), limits]


def from_tiers(engine: Engine, tokens: Sequence[int]) -> tuple[int, int]:
    """Asks with vLLM's own cache empty. Returns the tokens that came from memory and from disk, seen to be right."""
    before = engine.settle()
    engine.reset_gpu_cache()
    answer = engine.complete(tokens, ANSWER_TOKENS)
    after = engine.settle()
    reference = after_a_gpu_hit(engine, tokens, ANSWER_TOKENS)
    assert answer.cached_tokens == reference.cached_tokens == HIT_TOKENS, f"{answer.cached_tokens} tokens hit"
    assert_identical(reference, answer, "from us")
    memory, disk = (
        int(after.cellar("hit_tokens_total", tier=tier) - before.cellar("hit_tokens_total", tier=tier))
        for tier in ("dram", "nvme")
    )
    return memory, disk


def written(engine: Engine) -> bool:
    """Whether everything is on disk."""
    return engine.settle().cellar("nvme_writing") == 0


@pytest.mark.parametrize(
    ("limits", "why", "remedy"),
    [
        pytest.param("small-shm,small-group,no-ring,no-populate-einval", "control group", "--memory", id="group"),
        pytest.param("small-shm,no-ring,no-populate-eperm", "free shared memory", "--shm-size", id="shm"),
    ],
)
def test_an_engine_in_a_container_says_what_is_small_and_why_and_serves_from_both_tiers(
    tmp_path: Path, limits: str, why: str, remedy: str, seed: int
) -> None:
    """The group's files are made up: what is tested is that they are read, bound the pool, and are named.

    The worker is EngineCore's own, for in so little shared memory vLLM has no other.
    """
    model = tiny_models.llama(tmp_path / "llama")
    rng = random.Random(f"container-{seed}")
    prompts = [prompt(rng, PROMPT_TOKENS, 0, tiny_models.VOCABULARY - 1) for _ in range(PROMPTS)]
    # vLLM itself wants room for its KV cache below the group's limit.
    options: dict[str, Any] = {"model": model, "skip_tokenizer_init": True, "kv_cache_memory_bytes": kv_bytes(16 * MIB)}
    with temporary_disk_dir() as disk:
        nvme = {"nvme_dir": str(disk), "nvme_size": kv_bytes(128 * MIB), "write_through": True}
        cellar = {"pool_dir": None, "dram_size": WISH, "verify_loads": True, **nvme}
        with start_engine(tmp_path, tmp_path, cellar=cellar, before=confined(limits), **options) as engine:
            engine.wait_ready()
            said = [line for line in warnings(engine.log, "dram_size") if why in line]
            assert len(said) == 1 and remedy in said[0], engine.log_tail()
            refused = warnings(engine.log, "threads")
            assert len(refused) == 1 and "io_uring" in refused[0], engine.log_tail()
            for tokens in prompts:
                engine.call(Engine.complete, tokens, 1)
            wait_until(lambda: engine.call(written), "writes")
            found = [engine.call(from_tiers, tokens) for tokens in (prompts[0], prompts[-1])]
            assert found[0][1] > 0 and found[1][0] > 0, f"tokens from memory and from disk: {found}"
            after = engine.call(Engine.settle)
            assert not after.leftovers()
            assert after.cellar("nvme_io_uring") == 0
            assert after.cellar("load_failures_total") == 0
            print(f"{after.slots('total')} slots, {found}; said: {said + refused}")


@contextlib.contextmanager
def container(limit: str) -> Iterator[list[str]]:
    """A mount namespace that outlives what runs in it: the command that runs another one there."""
    with subprocess.Popen([*confined(limit), "sleep", "infinity"]) as holder:
        try:
            wait_until(lambda: Path(f"/proc/{holder.pid}/comm").read_text().strip() == "sleep", "the namespace")
            yield ["nsenter", "--mount", f"--target={holder.pid}"]
        finally:
            holder.kill()


@pytest.mark.soak
def test_a_server_starts_again_beside_the_pool_that_its_container_kept(tmp_path: Path, seed: int) -> None:
    """The worker and EngineCore talk through shared memory, of which vLLM wants 240 MiB free whenever it starts."""
    rng = random.Random(f"again-{seed}")
    prompts = [prompt(rng, PROMPT_TOKENS) for _ in range(3)]
    cellar = {"pool_dir": None, "dram_size": WISH, "verify_loads": True}
    references: list[Answer] = []
    with container("more-shm") as inside:
        before = [*inside, *confined("no-ring,no-populate-einval")]
        for life in range(2):
            with open_server(tmp_path, tmp_path, cellar=cellar, before=before, name=f"life-{life}") as server:
                said = warnings(server.log, "free shared memory")
                assert life or (len(said) == 1 and "--shm-size" in said[0]), server.log_tail()
                for tokens, reference in zip(prompts, references, strict=False):
                    answer = server.complete(tokens, ANSWER_TOKENS)
                    assert answer.cached_tokens == HIT_TOKENS
                    assert_identical(reference, answer, "from what the first life left")
                # A full batch: the largest messages that this server sends its worker.
                for _ in range(20):
                    server.complete(prompt(rng, BLOCK_TOKENS * (KV_BLOCKS - 3) // 2), 2)
                for tokens in [] if life else prompts:
                    server.complete(tokens, ANSWER_TOKENS)
                    references.append(server.complete(tokens, ANSWER_TOKENS))
                after = server.settle()
                assert not after.leftovers()
                print(f"life {life}: {after.slots('total')} slots, {after.hit_tokens} tokens from memory; said: {said}")
