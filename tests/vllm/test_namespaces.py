"""Starts that find what others left: other namespaces, other sizes, a kill, and a disk without room.

Whatever they find, memory and disk stay within what is configured, every start gets what it asked for as long as
nobody uses it, and answers are right.
"""

import contextlib
import json
import multiprocessing
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import pytest

from tests.deadlines import deadline
from tests.vllm import tiny_models
from tests.vllm.answers import Answer, assert_identical
from tests.vllm.engine_process import ONE_PROCESS, EngineProcess, start_engine
from tests.vllm.engines import Engine, environment, open_engine
from tests.vllm.metrics import Snapshot
from tests.vllm.mounts import fill, memory_dir, small_disk
from tests.vllm.places import temporary_disk_dir, temporary_pool_dir
from tests.vllm.processes import kill, wait_until
from tests.vllm.prompts import prompt
from tests.vllm.references import from_us
from tests.vllm.said import warnings
from tests.vllm.samples import Samples
from tests.vllm.server import BLOCK_TOKENS, Server, open_server
from tests.vllm.sizes import MIB, kv_bytes
from tests.vllm.traffic import background

P = ParamSpec("P")
R = TypeVar("R")

NAMESPACES = 10
# As many pools and stores fit beside each other; each start asks for its part.
PARTS = 4
POOL_BYTES = kv_bytes(32 * MIB)
STORE_BYTES = kv_bytes(48 * MIB)
PROMPT_BLOCKS = 20
PROMPTS = 4
ANSWER_TOKENS = 4

pytestmark = [pytest.mark.usefixtures("vllm_installed"), pytest.mark.timeout(deadline(3600))]


@pytest.fixture(scope="module")
def model(vllm_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama."""
    return tiny_models.llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def prompts(seed: int) -> list[list[int]]:
    """Prompts that share no block."""
    rng = random.Random(f"namespaces-{seed}")
    return [prompt(rng, PROMPT_BLOCKS * BLOCK_TOKENS + 9, 0, tiny_models.VOCABULARY - 1) for _ in range(PROMPTS)]


def listed(*command: str) -> list[dict[str, Any]]:
    """What `kvcellar COMMAND --json` says."""
    whole = [sys.executable, "-m", "kvcellar", *command, "--json"]
    found = json.loads(subprocess.run(whole, check=True, capture_output=True, text=True).stdout)
    assert isinstance(found, list)
    return found


def foretold(entries: list[dict[str, Any]], turn: str) -> list[str]:
    """The names of what nobody uses, in the order in which it would go."""
    going = sorted((entry for entry in entries if entry[turn] is not None), key=lambda entry: int(entry[turn]))
    return [entry["name"] for entry in going]


def assert_went_in_turn(before: list[dict[str, Any]], after: list[dict[str, Any]], turn: str, total: int) -> int:
    """Went what was said to go first, and no more than had to. Returns how many that were."""
    order, stayed = foretold(before, turn), {entry["name"] for entry in after}
    gone = [name for name in order if name not in stayed]
    assert gone == order[: len(gone)], f"{gone} went, and {order} was foretold"
    if gone:
        last = next(entry["bytes"] for entry in before if entry["name"] == gone[-1])
        sizes = sum(max(entry["bytes"], entry.get("capacity_bytes") or 0) for entry in after if entry[turn] is None)
        kept = sum(entry["bytes"] for entry in after if entry[turn] is not None)
        assert sizes + kept + last > total, f"{gone[-1]} went, and had room"
    return len(gone)


def start(
    tmp_path: Path, pool_dir: Path, name: str, cellar: dict[str, Any], model: Path
) -> contextlib.AbstractContextManager[EngineProcess]:
    """An engine of the tiny model in a process of its own."""
    return start_engine(tmp_path, pool_dir, cellar=cellar, name=name, **options(model))


def options(model: Path) -> dict[str, Any]:
    """Of any engine of the tiny model."""
    return {"model": model, "skip_tokenizer_init": True, "kv_cache_memory_bytes": kv_bytes(64 * MIB)}


@dataclass(frozen=True)
class Here:
    """An engine in this process, asked as one in a process of its own."""

    engine: Engine
    log: Path

    def call(self, function: Callable[Concatenate[Engine, P], R], *arguments: P.args, **named: P.kwargs) -> R:
        """What `function` answers."""
        return function(self.engine, *arguments, **named)

    def wait_ready(self) -> None:
        """It is."""


@contextlib.contextmanager
def output_to(file: Path) -> Iterator[None]:
    """What this process writes goes there."""
    own = {stream: os.dup(stream) for stream in (1, 2)}
    with file.open("wb", buffering=0) as output:
        for stream in own:
            os.dup2(output.fileno(), stream)
    try:
        yield
    finally:
        for stream, before in own.items():
            os.dup2(before, stream)
            os.close(before)


@contextlib.contextmanager
def start_here(tmp_path: Path, pool_dir: Path, name: str, cellar: dict[str, Any], model: Path) -> Iterator[Here]:
    """An engine of the tiny model in this process: it starts in a few seconds, and lets go of all that it had."""
    log = tmp_path / f"{name}.log"
    engines = open_engine(tmp_path, pool_dir, cellar=cellar, name=name, one_process=True, **options(model))
    with output_to(log), engines as engine:
        yield Here(engine, log)


def assert_serves(engine: EngineProcess | Here, prompts: list[list[int]]) -> Snapshot:
    """What was asked once comes back from us, and right."""
    for tokens in prompts:
        engine.call(Engine.complete, tokens, 1)
    for number, tokens in enumerate(prompts):
        hit, right = engine.call(from_us, tokens, ANSWER_TOKENS)
        assert right, f"prompt {number}, {hit} tokens hit"
        assert hit == PROMPT_BLOCKS * BLOCK_TOKENS, f"prompt {number}: {hit} tokens hit"
    after: Snapshot = engine.call(Engine.settle)
    assert not after.leftovers()
    return after


def change_namespaces(model: Path, tmp_path: Path, prompts: list[list[int]], starts: Callable[..., Any]) -> None:
    """Four fit: from the fifth start on one goes for each, the one used longest ago; at last one start wants all."""
    went = {"pools": 0, "stores": 0}
    with memory_dir(POOL_BYTES + 8 * MIB) as pool_dir, temporary_disk_dir() as disk:
        sizes = {"dram_size": POOL_BYTES, "nvme_dir": str(disk), "nvme_size": STORE_BYTES, "write_through": True}
        sizes["verify_loads"] = True
        with Samples({pool_dir: POOL_BYTES, disk: STORE_BYTES}) as samples:
            for turn in range(NAMESPACES + 1):
                parts = PARTS if turn < NAMESPACES else 1
                cellar = {**sizes, "namespace_salt": str(turn), "local_engines": parts}
                pools, stores = listed("pool", "ls", "--pool-dir", str(pool_dir)), listed("store", "ls", str(disk))
                with starts(tmp_path, pool_dir, f"engine-{turn}", cellar, model) as engine:
                    engine.wait_ready()
                    now = listed("pool", "ls", "--pool-dir", str(pool_dir)), listed("store", "ls", str(disk))
                    went["pools"] += assert_went_in_turn(pools, now[0], "would_go", POOL_BYTES)
                    went["stores"] += assert_went_in_turn(stores, now[1], "goes", STORE_BYTES)
                    (pool,) = [entry for entry in now[0] if entry["state"] == "used"]
                    (store,) = [entry for entry in now[1] if entry["state"] == "used"]
                    # A pool is a whole number of slots.
                    slot = pool["file_bytes"] // pool["slots"]
                    assert POOL_BYTES // parts - 2 * slot <= pool["bytes"] <= POOL_BYTES // parts
                    assert 0.9 * STORE_BYTES / parts < store["capacity_bytes"] <= STORE_BYTES // parts
                    assert_serves(engine, prompts)
                    assert "KV Cellar: dram tier" in engine.log.read_text(errors="replace"), "nothing is said there"
                    assert not warnings(engine.log, "cannot be known"), "nobody could use what it left"
                    assert not warnings(engine.log, "dram_size") + warnings(engine.log, "nvme_size"), "it got less"
        print(f"most: {samples.most}, {samples.count} looks, went: {went}")
        samples.assert_within()
        assert samples.most[pool_dir] > 0.9 * POOL_BYTES, "the bound was never near: this test proves nothing"
    assert went == {"pools": NAMESPACES, "stores": NAMESPACES}


def test_ten_changes_of_namespace_stay_within_both_sizes(model: Path, tmp_path: Path, prompts: list[list[int]]) -> None:
    """In one process, which began when the model's files were there: their starts do not wait for vLLM's imports."""
    spawn = multiprocessing.get_context("spawn")
    with environment(ONE_PROCESS), ProcessPoolExecutor(1, spawn) as process:
        process.submit(change_namespaces, model, tmp_path, prompts, start_here).result()


@pytest.mark.soak
def test_ten_changes_of_namespace_by_ten_processes_stay_within_both_sizes(
    model: Path, tmp_path: Path, prompts: list[list[int]]
) -> None:
    """Each finds what the one before has left, and nobody who uses it."""
    change_namespaces(model, tmp_path, prompts, start)


def test_a_full_disk_is_told_and_memory_serves(model: Path, tmp_path: Path, prompts: list[list[int]]) -> None:
    """Somebody else has filled it before the start."""
    with temporary_pool_dir() as pool_dir, small_disk(128 * MIB) as disk:
        fill(disk)
        nvme = {"nvme_dir": str(disk), "nvme_size": 64 * MIB, "nvme_reserve": 0}
        cellar = {"dram_size": POOL_BYTES, "verify_loads": True, **nvme}
        with start(tmp_path, pool_dir, "full", cellar, model) as engine:
            engine.wait_ready()
            after = assert_serves(engine, prompts)
            said = warnings(engine.log, "nvme tier holds nothing")
            assert len(said) == 1 and "No space left" in said[0] and "nvme_dir" in said[0], engine.log_tail()
            assert warnings(engine.log, "nvme_dir: the nvme tier will hold nothing"), "not told before the model"
        assert after.cellar("spilled_blocks_total") == 0


def known_answers(server: Server, prompts: list[list[int]]) -> list[Answer]:
    """Asked twice: the second time vLLM's own cache gives all it can, so the shape is the same in every life."""
    answers = []
    for tokens in prompts:
        server.complete(tokens, ANSWER_TOKENS)
        answers.append(server.complete(tokens, ANSWER_TOKENS))
        assert answers[-1].cached_tokens == (len(tokens) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    server.settle()
    return answers


def assert_known(server: Server, prompts: list[list[int]], references: list[Answer]) -> int:
    """The answers are those of the first life. Returns how many tokens came from what an earlier life left."""
    given = 0
    for tokens, reference in zip(prompts, references, strict=True):
        first, second = (server.complete(tokens, ANSWER_TOKENS) for _ in range(2))
        given += first.cached_tokens
        if first.cached_tokens == reference.cached_tokens:
            assert_identical(reference, first, "from what an earlier life left")
        assert_identical(reference, second, "from vLLM's own cache")
    after = server.settle()
    assert after.cellar("load_failures_total") == 0
    assert not after.leftovers()
    return given


@pytest.mark.soak
def test_a_start_with_another_size_after_a_kill_stays_within_it(tmp_path: Path, seed: int) -> None:
    """EngineCore is killed in the middle of traffic; the next start wants half, the one after it four times that."""
    rng = random.Random(f"other-size-{seed}")
    prompts = [prompt(rng, length) for length in (160, 161, 330)]
    sizes = [kv_bytes(128 * MIB), kv_bytes(64 * MIB), kv_bytes(256 * MIB)]
    references: list[Answer] = []
    given: list[int] = []
    with memory_dir(max(sizes) + 64 * MIB) as pool_dir, contextlib.ExitStack() as ends:
        for life, size in enumerate(sizes):
            # What a killed engine's processes still map is there until they let go; it is never added to.
            with Samples({pool_dir: max(size, sizes[life - 1] if life else 0)}) as beginning:
                cellar = {"dram_size": size, "verify_loads": True}
                server = ends.enter_context(open_server(tmp_path, pool_dir, cellar=cellar, name=f"life-{life}"))
            with Samples({pool_dir: size}) as serving:
                if life == 0:
                    references = known_answers(server, prompts)
                else:
                    given.append(assert_known(server, prompts, references))
                with background(server, rng, clients=4) as load:
                    wait_until(lambda load=load: load.answers >= 6, "traffic")
                    kill(server.family.engine_core)
                    load.stop.set()
            if life == len(sizes) - 1:
                server.sweep()
            print(f"life {life}: {size} wanted, {beginning.most}, then {serving.most}; {given} tokens given")
            beginning.assert_within()
            serving.assert_within()
            assert serving.most[pool_dir] > 0.9 * size, "it got less than it asked for"
    assert any(given), "nothing was ever adopted"
