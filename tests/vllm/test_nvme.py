"""The nvme tier under the real vLLM: what left memory comes back from disk, bit for bit, also after a restart."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.deadlines import deadline
from tests.vllm.answers import Answer, assert_identical
from tests.vllm.cache_model import Replay
from tests.vllm.engines import Engine, open_engine, open_heard
from tests.vllm.metrics import Snapshot
from tests.vllm.places import ROOT, temporary_disk_dir, temporary_pool_dir
from tests.vllm.processes import wait_until
from tests.vllm.prompts import Conversation
from tests.vllm.references import from_us
from tests.vllm.server import BLOCK_TOKENS, KV_BLOCKS
from tests.vllm.sizes import MIB, kv_bytes, kv_mib
from tests.vllm.subscriber import Subscriber

NVME_BYTES = kv_bytes(2048 * MIB)
ANSWER_TOKENS = 4
# On a good machine; see `deadline`.
SETTLE_S = 60.0
# Empty directories.
EMPTY_BYTES_MAX = 64 << 10
# Set for a run that may not use io_uring, or may lock little memory: what the gauges must say then.
GAUGES = "KVCELLAR_TEST_NVME_GAUGES"

pytestmark = pytest.mark.usefixtures("vllm_installed")


def bytes_on_disk(directory: Path) -> int:
    """Real bytes, as `du` counts them."""
    total = 0
    for path in directory.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_blocks * 512
    return total


@dataclass
class Sampler:
    """Samples the bytes below a directory until it is told to stop."""

    directory: Path
    most: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> "Sampler":
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def _run(self) -> None:
        while not self._stop.wait(0.1):
            self.most = max(self.most, bytes_on_disk(self.directory))

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()


@dataclass
class Tiers:
    """What must be where, by the rules alone: one LRU order in memory; everything ever stored lies on disk.

    The workload keeps to what the cleaner can follow (`settle` between requests, prompts of less than the clean share
    of the pool), so no block is dropped before it was written. A block on disk that vLLM computed or found itself is
    not stored again; a block that comes from disk is the hottest in memory.
    """

    slots: int
    memory: list[tuple[int, int]] = field(default_factory=list)
    disk: set[tuple[int, int]] = field(default_factory=set)

    def _put(self, keys: list[tuple[int, int]]) -> None:
        """Makes keys the hottest, the first of them hottest of all."""
        for key in reversed(keys):
            if key in self.memory:
                self.memory.remove(key)
            self.memory.append(key)

    def _make_room(self, keys: list[tuple[int, int]]) -> None:
        fresh = [key for key in keys if key not in self.memory]
        while len(self.memory) + len(fresh) > self.slots:
            victim = next(key for key in self.memory if key not in keys)
            self.memory.remove(victim)

    def serve(self, prompt: int, loadable: int, stored: int) -> tuple[int, int]:
        """One request that vLLM's own cache does not help: blocks from memory and from disk."""
        wanted = [(prompt, index) for index in range(loadable)]
        hit = []
        for key in wanted:
            if key not in self.memory and key not in self.disk:
                break
            hit.append(key)
        from_memory = sum(key in self.memory for key in hit)
        self._put([key for key in hit if key in self.memory])
        self._make_room(hit)
        self._put(hit)
        fresh = [(prompt, index) for index in range(stored) if (prompt, index) not in self.memory]
        fresh = [key for key in fresh if key not in self.disk]
        self._make_room([*hit, *fresh])
        self._put(fresh)
        self.disk.update(fresh)
        self._put([(prompt, index) for index in range(stored) if (prompt, index) in self.memory])
        return from_memory, len(hit) - from_memory

    def restart(self) -> None:
        """Memory is gone."""
        self.memory.clear()


def settle(engine: Engine) -> Snapshot:
    """Lets copies and writes end."""
    quiet = 0
    end = time.monotonic() + deadline(SETTLE_S)
    while time.monotonic() < end:
        snapshot = engine.settle()
        busy = snapshot.cellar("nvme_writing") + snapshot.cellar("nvme_reading")
        busy += snapshot.cellar("pool_slots", state="filling")
        # Three times: while the store grows by a segment nothing is being written, and yet not all
        # is written.
        quiet = 0 if busy else quiet + 1
        if quiet == 3:
            return snapshot
        time.sleep(0.02)
    raise AssertionError("writes to disk did not end")


def prompts(seed: int, blocks: int) -> list[tuple[int, ...]]:
    """Prompts without common prefix, of about so many blocks together."""
    random = Random(seed)
    made: list[tuple[int, ...]] = []
    while sum(len(prompt) // BLOCK_TOKENS for prompt in made) < blocks:
        length = random.randrange(8 * BLOCK_TOKENS, 24 * BLOCK_TOKENS)
        made.append(tuple(random.randrange(1000, 40000) for _ in range(length)))
    return made


def hits(snapshot: Snapshot) -> tuple[float, float]:
    """Tokens served by each tier so far."""
    return snapshot.cellar("hit_tokens_total", tier="dram"), snapshot.cellar("hit_tokens_total", tier="nvme")


def campaign(tmp_path: Path, seed: int, blocks: int) -> None:
    """Serves every prompt three times, with a restart that leaves only the disk before the third."""
    work = prompts(seed, blocks)
    cellar = {"dram_size": kv_mib(64), "load_policy": "always", "nvme_size": NVME_BYTES, "namespace_salt": "nvme"}
    expected: list[Answer] = []
    overlapped = 0.0
    with temporary_disk_dir() as disk, Sampler(disk) as sampler:
        tiers: Tiers | None = None
        for part in range(2):
            options = {**cellar, "nvme_dir": str(disk)}
            with (
                temporary_pool_dir() as pool_dir,
                open_engine(tmp_path, pool_dir, cellar=options, name=f"part-{part}", one_process=True) as engine,
            ):
                before = settle(engine)
                gauges = tuple(int(before.cellar(name)) for name in ("nvme_io_uring", "nvme_registered"))
                assert ",".join(map(str, gauges)) == os.environ.get(GAUGES, "1,1")
                if tiers is None:
                    tiers = Tiers(int(before.cellar("pool_slots", state="total")))
                    assert blocks > 2 * tiers.slots, "the working set fits into memory: the test proves nothing"
                else:
                    tiers.restart()
                    assert before.cellar("nvme_reopened_blocks_total") == len(tiers.disk)
                for turn in range(2 - part):
                    for number, prompt in enumerate(work):
                        engine.reset_gpu_cache()
                        answer = engine.complete(prompt, ANSWER_TOKENS)
                        after = settle(engine)
                        loadable = (len(prompt) - 1) // BLOCK_TOKENS
                        stored = (len(prompt) + ANSWER_TOKENS - 1) // BLOCK_TOKENS
                        predicted = tiers.serve(number, loadable, stored)
                        seen = tuple(b - a for a, b in zip(hits(before), hits(after), strict=True))
                        where = f"part {part}, turn {turn}, prompt {number}"
                        assert seen == tuple(count * BLOCK_TOKENS for count in predicted), where
                        before = after
                        if part == 0 and turn == 0:
                            expected.append(engine.complete(prompt, ANSWER_TOKENS))
                            tiers.serve(number, 0, stored)
                            before = settle(engine)
                        else:
                            assert_identical(expected[number], answer, where)
                final = settle(engine)
                assert final.cellar("corrupt_extents_total") == final.cellar("disk_errors_total") == 0
                assert final.cellar("dropped_blocks_total", reason="unspilled") == 0
                assert final.cellar("pins") == final.cellar("leases") == final.cellar("fences") == 0
                overlapped += final.cellar("overlapped_loads_total")
        assert overlapped > 0, "no restore was followed while it was read"
        assert 0 < sampler.most <= NVME_BYTES
        taken = bytes_on_disk(disk)
        assert taken > EMPTY_BYTES_MAX
        free_before = shutil.disk_usage(disk.parent).free
        dropped = subprocess.run(
            [sys.executable, "-m", "kvcellar", "store", "drop", str(disk), "--yes"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert dropped.returncode == 0, dropped.stderr
        assert bytes_on_disk(disk) <= EMPTY_BYTES_MAX, "dropping left something"
        # Others use the disk too, hence the share, and readings just before and after.
        assert shutil.disk_usage(disk.parent).free > free_before + taken // 2


def test_a_working_set_larger_than_memory_is_served_from_disk(tmp_path: Path, seed: int) -> None:
    """About 140 MiB over a pool of 64 MiB."""
    campaign(tmp_path, seed, 200)


@pytest.mark.parametrize(("limit", "gauges"), [("no-ring", "0,0"), ("little-memlock", "1,0")])
def test_the_same_where_the_system_gives_less(limit: str, gauges: str) -> None:
    """The test above, in a process that may not use io_uring, or may not lock the pool."""
    here = Path(__file__)
    test = f"{here}::{test_a_working_set_larger_than_memory_is_served_from_disk.__name__}"
    confined = [sys.executable, str(here.with_name("confined.py")), limit]
    done = subprocess.run(
        [*confined, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test],
        cwd=ROOT,
        env={**os.environ, GAUGES: gauges},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]


def test_at_eight_conversations_the_replay_agrees(tmp_path: Path, seed: int) -> None:
    """The recorded order of operations, fed to the model: every hit, eviction and restore, exactly."""
    cellar = {"dram_size": kv_mib(64), "load_policy": "always", "nvme_size": NVME_BYTES, "namespace_salt": "nvme-eight"}
    options: dict[str, Any] = {"num_gpu_blocks_override": KV_BLOCKS, "max_num_batched_tokens": 200}
    with (
        temporary_disk_dir() as disk,
        temporary_pool_dir() as pool_dir,
        open_engine(
            tmp_path, pool_dir, cellar={**cellar, "nvme_dir": str(disk)}, one_process=True, **options
        ) as engine,
    ):
        for _ in range(2):
            lanes = [Conversation(Random(f"{seed}-{lane}"), (120, 300), 1000) for lane in range(8)]
            engine.converse(lanes, ANSWER_TOKENS)
        after = settle(engine)
        replay = Replay(BLOCK_TOKENS).run(engine.trace())
    said = (
        f"{replay.hit_tokens} hit tokens, {replay.disk_hit_tokens} from disk, {replay.streamed_blocks} blocks streamed"
    )
    said += f", {replay.spilled_blocks} spilled, {replay.unspilled_blocks} not in time, seed {seed}"
    print(said)
    assert hits(after) == (replay.hit_tokens - replay.disk_hit_tokens, replay.disk_hit_tokens), said
    assert after.cellar("spilled_blocks_total") == replay.spilled_blocks > 0
    assert after.cellar("stored_blocks_total") == replay.stored_blocks - replay.lost_blocks
    assert after.cellar("evicted_blocks_total", tier="dram") == replay.evicted_blocks
    assert after.cellar("dropped_blocks_total", reason="unspilled") == replay.unspilled_blocks
    assert replay.disk_hit_tokens > 0 and replay.states > 0, said
    assert not after.leftovers()


def on_disk(subscriber: Subscriber) -> dict[int, tuple[int | None, tuple[int, ...]]]:
    """Blocks of the nvme tier as an index would keep them: hash to parent and tokens."""
    held: dict[int, tuple[int | None, tuple[int, ...]]] = {}
    for event in list(subscriber.events):
        if event.get("medium") != "STORAGE":
            continue
        if event["type"] == "BlockRemoved":
            for name in event["block_hashes"]:
                del held[name]
            continue
        assert len(event["token_ids"]) == BLOCK_TOKENS * len(event["block_hashes"]), "token ids do not cover the blocks"
        parent = event["parent_block_hash"]
        for index, name in enumerate(event["block_hashes"]):
            assert name not in held, "stored twice"
            tokens = event["token_ids"][index * BLOCK_TOKENS : (index + 1) * BLOCK_TOKENS]
            held[name] = (parent, tuple(tokens))
            parent = name
    return held


def test_an_idle_engine_says_again_what_survived_a_restart(tmp_path: Path, seed: int) -> None:
    """Nobody sends it a request; its subscriber is new too."""
    cellar = {"dram_size": kv_mib(64), "nvme_size": NVME_BYTES, "namespace_salt": "nvme-again", "write_through": True}
    told: list[dict[int, tuple[int | None, tuple[int, ...]]]] = []
    with temporary_disk_dir() as disk:
        for part in range(2):
            options = {**cellar, "nvme_dir": str(disk)}
            with open_heard(tmp_path, cellar=options, name=f"again-{part}") as (engine, subscriber):
                if part == 0:
                    for prompt in prompts(seed, 150):
                        engine.complete(prompt, ANSWER_TOKENS)
                    written = settle(engine).cellar("spilled_blocks_total")
                    wait_until(lambda seen=subscriber, count=written: len(on_disk(seen)) >= count, "all events")
                else:
                    wait_until(lambda seen=subscriber: len(on_disk(seen)) >= len(told[0]), "the survivors' events")
                    assert not engine.served
                    assert subscriber.sequences == list(range(len(subscriber.sequences)))
                    assert not subscriber.of("BlockStored", "CPU")
                told.append(on_disk(subscriber))
    assert len(told[0]) > 100
    assert told[1] == told[0]


@pytest.mark.soak
def test_a_working_set_of_a_gibibyte(tmp_path: Path, seed: int) -> None:
    """The same, with a working set of 1 GiB."""
    campaign(tmp_path, seed, 1480)


def test_a_directory_removed_under_a_running_engine_costs_hits_only(
    tmp_path: Path, seed: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """Requests go on with the same answers; the tier says that it is gone, to metrics, subscribers and vLLM's log."""
    work = prompts(seed, 120)
    cellar = {"dram_size": kv_mib(64), "nvme_size": NVME_BYTES, "namespace_salt": "nvme-gone", "write_through": True}
    with (
        temporary_disk_dir() as disk,
        open_heard(tmp_path, cellar={**cellar, "nvme_dir": str(disk)}) as (engine, subscriber),
    ):
        for prompt in work:
            engine.complete(prompt, ANSWER_TOKENS)
            settle(engine)
        wait_until(lambda: bool(on_disk(subscriber)), "blocks on disk")
        shutil.rmtree(disk)
        wait_until(lambda: engine.settle().cellar("nvme_outages_total") == 1, "the outage")
        gone = engine.settle()
        # Each twice: computed again when memory had pushed it out, then from memory.
        for number, prompt in [(number, prompt) for number, prompt in enumerate(work) for _ in range(2)]:
            given, right = from_us(engine, prompt, ANSWER_TOKENS)
            assert right, f"prompt {number}: another answer with {given} tokens from us"
        after = engine.settle()
        wait_until(lambda: not on_disk(subscriber), "the removal of every block on disk")
        assert after.cellar("nvme_in_service") == 0
        assert hits(after)[1] == hits(gone)[1], "a hit on a disk that is gone"
        assert hits(after)[0] > hits(gone)[0], "memory served nothing"
        assert after.cellar("load_failures_total") == 0
        assert not after.leftovers()
    said = capfd.readouterr().out
    print(said)
    assert re.search(r"WARNING .*KV Cellar: the nvme tier is out of service: its directory is gone", said)
