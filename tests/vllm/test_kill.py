"""SIGKILL of worker, EngineCore, front end: the next start is clean and takes over only what nobody can still write."""

import contextlib
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.vllm.answers import Answer, assert_identical
from tests.vllm.places import pool_files, temporary_pool_dir
from tests.vllm.processes import kill, mappers, wait_until
from tests.vllm.prompts import prompt
from tests.vllm.server import BLOCK_TOKENS, Server, open_server
from tests.vllm.sizes import kv_mib
from tests.vllm.traffic import background

# Loads are verified against checksums: an adopted block must be what it was.
CELLAR = {"dram_size": kv_mib(256), "namespace_salt": "kill", "verify_loads": True}
ANSWER_TOKENS = 8
# How long processes without a front end, and a start that meets them, may take to let go.
LET_GO_S = 120.0


@dataclass
class Site:
    """One pool directory over several lives of an engine, with the answers that every life must give."""

    work_dir: Path
    pool_dir: Path
    prompts: list[list[int]]
    ends: contextlib.ExitStack
    references: list[Answer] = field(default_factory=list)
    lives: list[Server] = field(default_factory=list)

    def start(self) -> Server:
        """The next life, in processes of its own; it ends with the site at the latest."""
        name = f"life-{len(self.lives)}"
        self.lives.append(self.ends.enter_context(open_server(self.work_dir, self.pool_dir, cellar=CELLAR, name=name)))
        return self.lives[-1]

    def running(self) -> Server:
        """The present life; a new one where there is none, also after a test that failed."""
        return self.lives[-1] if self.lives and self.lives[-1].process.poll() is None else self.start()


@pytest.fixture(scope="module")
def site(vllm_installed: None, tmp_path_factory: pytest.TempPathFactory, seed: int) -> Iterator[Site]:
    """A pool directory that is empty at first and gone at the end."""
    rng = random.Random(f"kill-{seed}")
    prompts = [prompt(rng, length) for length in (160, 161, 400)]
    with temporary_pool_dir() as pool_dir, contextlib.ExitStack() as ends:
        yield Site(tmp_path_factory.mktemp("kill"), pool_dir, prompts, ends)


def pools(site: Site) -> list[dict[str, Any]]:
    """What `kvcellar pool ls --json` says."""
    command = [sys.executable, "-m", "kvcellar", "pool", "ls", "--pool-dir", str(site.pool_dir), "--json"]
    listed = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return list(listed["pools"] if isinstance(listed, dict) else listed)


def assert_alone(site: Site, server: Server) -> Path:
    """The server's own processes map exactly one pool file, and nobody else maps that one. Returns it."""
    members = server.family.pids()
    own = [pool for pool in pool_files(site.pool_dir) if mappers(pool) & members]
    assert len(own) == 1, f"the engine maps {own}"
    assert mappers(own[0]) <= members, "the pool is shared with a process of another engine"
    (listed,) = [entry for entry in pools(site) if Path(entry["path"]) == own[0]]
    assert (listed["state"], listed["owner_pid"]) == ("used", server.family.engine_core.pid)
    return own[0]


def assert_answers(site: Site, server: Server, *, adopted: bool, whole: bool) -> None:
    """The known prompts give the known answers, from dram where blocks were adopted; with `whole` all of them were."""
    before = server.settle()
    assert (before.cellar("adopted_blocks_total") > 0) == adopted
    for tokens, reference in zip(site.prompts, site.references, strict=True):
        wanted = (len(tokens) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        assert server.reset()
        first = server.complete(tokens, ANSWER_TOKENS)
        assert first.cached_tokens <= wanted * adopted
        if whole:
            assert first.cached_tokens == wanted, f"{len(tokens)} tokens: adopted blocks were not hit"
        if first.cached_tokens == wanted:
            assert_identical(reference, first, f"{len(tokens)} tokens, from adopted blocks")
        again = server.complete(tokens, ANSWER_TOKENS)
        assert again.cached_tokens == wanted
        assert_identical(reference, again, f"{len(tokens)} tokens, from vLLM's own cache after a restart")
    after = server.settle()
    assert after.cellar("load_failures_total") == 0
    assert not after.leftovers()


def learn(site: Site, server: Server) -> None:
    """Notes the answers after a hit in vLLM's own cache, once; makes sure that all blocks lie in dram."""
    for tokens in site.prompts:
        server.complete(tokens, ANSWER_TOKENS)
        answer = server.complete(tokens, ANSWER_TOKENS)
        assert answer.cached_tokens == (len(tokens) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        if len(site.references) < len(site.prompts):
            site.references.append(answer)
    server.settle()


def victim_of(server: Server, victim: str) -> psutil.Process:
    family = server.family
    return {"worker": family.workers[0], "engine_core": family.engine_core, "front_end": family.front_end}[victim]


def test_a_clean_restart_adopts_the_pool(site: Site) -> None:
    server = site.running()
    learn(site, server)
    first = assert_alone(site, server)
    server.stop()
    assert pool_files(site.pool_dir) == [first], "the pool should outlive the engine"
    assert not mappers(first)
    successor = site.start()
    assert assert_alone(site, successor) == first, "the left pool was not taken over"
    assert_answers(site, successor, adopted=True, whole=True)


# Idle and busy differ most for the front end, whose children outlive it: the other idle ones are in
# the long campaign.
KILLS = [
    ("worker", True),
    ("engine_core", True),
    ("front_end", False),
    ("front_end", True),
    pytest.param("worker", False, marks=pytest.mark.soak),
    pytest.param("engine_core", False, marks=pytest.mark.soak),
]


@pytest.mark.parametrize(("victim", "busy"), KILLS)
def test_the_start_after_a_kill_is_clean(site: Site, seed: int, victim: str, busy: bool) -> None:
    rng = random.Random(f"kill-{seed}-{victim}-{busy}")
    server = site.running()
    learn(site, server)
    old = assert_alone(site, server)
    members = server.family.pids()
    with background(server, rng, clients=4 if busy else 0) as load:
        if busy:
            wait_until(lambda: load.answers >= 6, "traffic")
        kill(victim_of(server, victim))
        load.stop.set()
        # Started at once, while what the kill left over may still run and write.
        successor = site.start()
    new = assert_alone(site, successor)
    assert not (mappers(new) & members), "the new engine shares its pool with the killed one's processes"
    outlived = len(server.family.survivors())
    print(f"{victim}, busy {busy}: {outlived} processes outlived the start, {old.name} -> {new.name}, seed {seed}")
    assert_answers(site, successor, adopted=new == old, whole=new == old and not busy)
    # Processes without a front end notice it and go, or at least let go of the pool.
    others = [pool for pool in pool_files(site.pool_dir) if pool != new]
    wait_until(lambda: not any(mappers(pool) & members for pool in others), "letting go", LET_GO_S)
    server.sweep()
    assert len(others) <= 1, f"pools pile up: {others}"
    for pool in others:
        assert not mappers(pool)
        remove(site, pool)
    assert pool_files(site.pool_dir) == [new]


def remove(site: Site, pool: Path) -> None:
    """`kvcellar pool rm`."""
    command = [sys.executable, "-m", "kvcellar", "pool", "rm", "--pool-dir", str(site.pool_dir), pool.stem]
    subprocess.run(command, check=True, capture_output=True)


def test_a_pool_in_use_cannot_be_removed_and_a_left_one_can(site: Site) -> None:
    server = site.running()
    pool = assert_alone(site, server)
    with pytest.raises(subprocess.CalledProcessError) as refusal:
        remove(site, pool)
    assert str(server.family.engine_core.pid) in refusal.value.stderr.decode()
    assert pool.exists()
    server.stop()
    for left in pool_files(site.pool_dir):
        remove(site, left)
    assert pool_files(site.pool_dir) == []
    assert pools(site) == []
