"""Several engines of one user on one machine: together they stay within `dram_size` and `nvme_size`, and each serves.

What they take is read from the file system every 50 ms, from before the first starts until after the last has served.
"""

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.deadlines import deadline
from tests.vllm import tiny_models
from tests.vllm.answers import Answer, assert_identical
from tests.vllm.engine_process import EngineProcess, start_engine
from tests.vllm.engines import Engine
from tests.vllm.metrics import Snapshot
from tests.vllm.mounts import memory_dir
from tests.vllm.places import pool_files, temporary_disk_dir
from tests.vllm.processes import wait_until
from tests.vllm.prompts import prompt
from tests.vllm.references import from_us
from tests.vllm.said import warnings
from tests.vllm.samples import Samples
from tests.vllm.server import BLOCK_TOKENS, Server, completion, open_server
from tests.vllm.sizes import MIB, kv_bytes
from tests.vllm.traffic import background

RANKS = 2
ANSWER_TOKENS = 4
HIT_TOKENS = 6 * BLOCK_TOKENS
# Two engines on a few cores: threads that spin while they wait for each other cost more than they
# bring.
ENV = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
# A part that was rounded down to whole slots, or segments.
NEARLY = 0.9

pytestmark = [pytest.mark.usefixtures("vllm_installed"), pytest.mark.timeout(deadline(3600))]


@contextlib.contextmanager
def places(dram: int, nvme: int) -> Iterator[tuple[Path, Path, Samples]]:
    """Directories for both tiers, watched."""
    with (
        memory_dir(2 * dram) as pool_dir,
        temporary_disk_dir() as disk,
        Samples({pool_dir: dram, disk: nvme}) as samples,
    ):
        yield pool_dir, disk, samples


def pool_sizes(pool_dir: Path) -> list[int]:
    """The lengths of all pools."""
    return [path.stat().st_size for path in pool_files(pool_dir)]


def of_rank(server: Server, tokens: list[int], rank: int) -> tuple[int, Answer]:
    """A completion by one of the engines: cached tokens, and what it says."""
    response = server.client.post(
        "/v1/completions", json=completion(tokens, ANSWER_TOKENS), headers={"X-data-parallel-rank": str(rank)}
    )
    response.raise_for_status()
    answer = Answer.of_json(response.json())
    return answer.cached_tokens, answer


def quiet(server: Server) -> Snapshot:
    """Lets the copies of all engines end. A request to each makes it step, and tell."""

    def ended() -> bool:
        for rank in range(RANKS):
            of_rank(server, [1, 2, 3], rank)
        now = server.metrics()
        return not now.leftovers() and now.cellar("nvme_writing") == 0 and now.cellar("stored_blocks_total") > 0

    wait_until(ended, "the end of copies and writes")
    return server.metrics()


def test_data_parallel_engines_share_both_sizes_and_each_serves_hits(tmp_path: Path, seed: int) -> None:
    """`vllm serve --data-parallel-size 2` of a dense model: vLLM makes independent engines of its ranks."""
    rng = random.Random(f"ranks-{seed}")
    prompts = [[prompt(rng, HIT_TOKENS + 5) for _ in range(2)] for _ in range(RANKS)]
    dram, nvme = kv_bytes(128 * MIB), kv_bytes(256 * MIB)
    with places(dram, nvme) as (pool_dir, disk, samples):
        cellar = {
            "dram_size": dram,
            "nvme_dir": str(disk),
            "nvme_size": nvme,
            "write_through": True,
            "verify_loads": True,
            "trace_file": None,
        }
        more = ["--api-server-count", "1"]
        with open_server(tmp_path, pool_dir, cellar=cellar, more=more, env=ENV, engines=RANKS) as server:
            sizes = pool_sizes(pool_dir)
            assert len(sizes) == RANKS, f"{sizes}\n{server.log_tail()}"
            assert all(NEARLY * dram / RANKS < size <= dram // RANKS for size in sizes), sizes
            with background(server, rng, clients=3) as load:
                wait_until(lambda: load.answers >= 8, "traffic")
            assert load.errors == 0, server.log_tail()
            known = [[ask_twice(server, tokens, rank) for tokens in prompts[rank]] for rank in range(RANKS)]
            quiet(server)
            wait_until(server.reset, "the reset of vLLM's caches")
            for rank in range(RANKS):
                for tokens, reference in zip(prompts[rank], known[rank], strict=True):
                    hit, answer = of_rank(server, tokens, rank)
                    assert hit == HIT_TOKENS, f"rank {rank}: {hit} tokens hit"
                    assert_identical(reference, answer, f"rank {rank}")
            after = quiet(server)
            assert after.hit_tokens >= RANKS * 2 * HIT_TOKENS
            assert after.cellar("load_failures_total") == 0
            assert "shared by 2 engines" in server.log.read_text(errors="replace")
        print(f"pools {sizes} of {dram}; most {samples.most}, {samples.count} looks; {after.hit_tokens} tokens")
        samples.assert_within()


def ask_twice(server: Server, tokens: list[int], rank: int) -> Answer:
    """The answer after a hit in vLLM's own cache."""
    of_rank(server, tokens, rank)
    hit, answer = of_rank(server, tokens, rank)
    assert hit == HIT_TOKENS
    return answer


@pytest.fixture(scope="module")
def model(vllm_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama."""
    return tiny_models.llama(tmp_path_factory.mktemp("llama"))


def two_engines(
    ends: contextlib.ExitStack, tmp_path: Path, pool_dir: Path, model: Path, cellar: dict[str, Any], *, together: bool
) -> list[EngineProcess]:
    """Two engines of the tiny model, started at once or one after the other."""
    options: dict[str, Any] = {"model": model, "skip_tokenizer_init": True, "kv_cache_memory_bytes": kv_bytes(64 * MIB)}
    engines = []
    for name in ("one", "two"):
        start = start_engine(tmp_path, pool_dir, cellar={"verify_loads": True, **cellar}, name=name, **options)
        engines.append(ends.enter_context(start))
        if not together:
            engines[-1].wait_ready()
    if together:
        for engine in engines:
            engine.wait_ready()
    return engines


def assert_serves(engine: EngineProcess, rng: random.Random) -> int:
    """The engine answers right; returns how many tokens we gave it."""
    tokens = prompt(rng, HIT_TOKENS + 5, 0, tiny_models.VOCABULARY - 1)
    engine.call(Engine.complete, tokens, 1)
    hit, right = engine.call(from_us, tokens, ANSWER_TOKENS)
    assert right, f"{hit} tokens hit"
    assert not engine.call(Engine.settle).leftovers()
    return hit


@pytest.mark.soak
def test_independent_engines_that_know_of_each_other_get_a_half_each(model: Path, tmp_path: Path, seed: int) -> None:
    rng, dram, nvme = random.Random(f"halves-{seed}"), kv_bytes(32 * MIB), kv_bytes(48 * MIB)
    with places(dram, nvme) as (pool_dir, disk, samples), contextlib.ExitStack() as ends:
        cellar = {"dram_size": dram, "nvme_dir": str(disk), "nvme_size": nvme, "local_engines": 2}
        engines = two_engines(ends, tmp_path, pool_dir, model, cellar, together=True)
        sizes = pool_sizes(pool_dir)
        assert len(sizes) == 2 and all(NEARLY * dram / 2 < size <= dram // 2 for size in sizes), sizes
        for engine in engines:
            assert not warnings(engine.log, "dram_size") + warnings(engine.log, "nvme"), engine.log_tail()
            assert assert_serves(engine, rng) == HIT_TOKENS
            assert engine.call(Engine.settle).cellar("nvme_extents") > 0
        print(f"pools {sizes} of {dram}; most {samples.most}, {samples.count} looks")
    samples.assert_within()


@pytest.mark.soak
def test_an_engine_that_finds_all_room_taken_says_who_has_it_and_serves(model: Path, tmp_path: Path, seed: int) -> None:
    """Nobody told the first that there would be a second."""
    rng, dram, nvme = random.Random(f"taken-{seed}"), kv_bytes(32 * MIB), kv_bytes(48 * MIB)
    with places(dram, nvme) as (pool_dir, disk, samples), contextlib.ExitStack() as ends:
        cellar = {"dram_size": dram, "nvme_dir": str(disk), "nvme_size": nvme}
        first, second = two_engines(ends, tmp_path, pool_dir, model, cellar, together=False)
        said = warnings(second.log, f"process {first.process.pid}")
        assert any("dram_size" in line for line in said), second.log_tail()
        assert assert_serves(first, rng) == HIT_TOKENS
        given = assert_serves(second, rng)
        print(f"second: {given} tokens; said: {said}; most {samples.most}")
    samples.assert_within()
