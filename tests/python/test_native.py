"""The native module through its Python border: settings, errors, and a block's whole way in one process."""

import ctypes
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kvcellar import ConfigError, DataLostError, KvcellarError, SystemRefusedError, UnsupportedError, window
from kvcellar._native import Config, CopyWorker, StoredRun, TierEngine, check_controls, next_log_line
from kvcellar.command import run as run_command

from tests.deadlines import deadline
from tests.vllm.places import temporary_disk_dir

BLOCK_TOKENS = 16
PAGE = 1000
BLOCKS = 8
GROUPING = json.dumps(
    {
        "groups": [{"kind": "full", "kind_name": "full_attention", "block_tokens": BLOCK_TOKENS, "eagle": False}],
        "hash_tokens": BLOCK_TOKENS,
        "hit_tokens": BLOCK_TOKENS,
    }
)


@pytest.fixture
def pool_dir() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(dir="/dev/shm"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def disk_dir() -> Iterator[Path]:
    with temporary_disk_dir() as path:
        yield path


def config(pool_dir: Path, /, **more: object) -> Config:
    return Config.parse(json.dumps({"dram_size": "1MiB", "pool_dir": str(pool_dir), **more}))


def open_pool(engine: TierEngine, block_bytes: int = 2 * PAGE) -> None:
    ranks = json.dumps([{"block_bytes": [block_bytes], "replica_of": [None]}])
    engine.open_pool(ranks, '{"model": "test"}', True, lambda done, total: None)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dram_sise": "1GiB"}, ["dram_sise", "Did you mean `dram_size`"]),
        ({"dram_size": -5}, ["dram_size", "-5", "Write a size"]),
        ({"dram_size": "-1GiB"}, ["dram_size", "Write a size"]),
        ({"unsupported_groups": "maybe"}, ["unsupported_groups", '"error" or "bypass"']),
        ({"trace_file": "relative"}, ["trace_file", "absolute path"]),
    ],
)
def test_a_wrong_setting_is_named_with_its_remedy(settings: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.parse(json.dumps(settings))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_size_over_the_machines_memory_is_refused_by_name(pool_dir: Path) -> None:
    engine = TierEngine(config(pool_dir, dram_size="512TiB"), GROUPING)
    with pytest.raises(ConfigError, match=r"dram_size.*whole memory"):
        open_pool(engine)
    assert not list(pool_dir.rglob("*.pool")), "a refused pool left a file"


def test_a_size_under_one_block_is_refused_by_name(pool_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"dram_size.*does not hold one block.*at least"):
        open_pool(TierEngine(config(pool_dir, dram_size="64KiB"), GROUPING))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pool_dir": "{shm}/no/such"}, ["pool_dir", "does not exist", "mkdir -p"]),
        ({"pool_dir": "{shm}/file"}, ["pool_dir", "no directory"]),
        ({"pool_dir": "{tmp}"}, ["pool_dir", "not lie in memory", "tmpfs"]),
        ({"pool_dir": "{shm}/planted"}, ["pool_dir", "private directory", "Remove it"]),
        ({"dram_size": "512TiB"}, ["dram_size", "whole memory"]),
        ({"nvme_dir": "{tmp}/no/such"}, ["nvme_dir", "does not exist", "mkdir -p"]),
        ({"nvme_dir": "{tmp}/file"}, ["nvme_dir", "no directory"]),
        ({"nvme_dir": "{tmp}/planted"}, ["nvme_dir", "private directory", "Remove it"]),
        ({"nvme_dir": "{shm}"}, ["nvme_dir", "same directory as pool_dir"]),
        ({"nvme_dir": "{shm}/planted"}, ["nvme_dir", "tmpfs", "no disk"]),
        ({"nvme_dir": "{tmp}", "nvme_size": "4000TiB"}, ["nvme_size", "has in all", "nvme_dir"]),
        ({"nvme_dir": "{tmp}/fresh", "nvme_size": "4000TiB"}, ["nvme_size", "has in all", "nvme_dir"]),
        ({"trace_file": "{tmp}/no/such"}, ["trace_file", "does not exist", "Make"]),
        ({"trace_file": "{tmp}"}, ["trace_file", "is a directory"]),
    ],
)
def test_what_cannot_work_here_is_told_in_one_line(
    settings: dict[str, str], words: list[str], pool_dir: Path, disk_dir: Path
) -> None:
    import os

    for place in (pool_dir, disk_dir):
        (place / "file").touch()
        (place / "planted").mkdir()
        (place / "planted" / f"kvcellar-{os.geteuid()}").symlink_to(disk_dir)
    filled = {key: value.format(shm=pool_dir, tmp=disk_dir) for key, value in settings.items()}
    before = sorted(disk_dir.rglob("*"))
    checked = config(pool_dir, **filled)
    with pytest.raises(ConfigError) as caught:
        checked.check_machine()
    text = str(caught.value)
    assert all(word in text for word in words) and "\n" not in text, text
    assert text.startswith(words[0]), text
    assert sorted(disk_dir.rglob("*")) == before, "looking made something"


def test_a_machine_that_suits_is_not_complained_of(pool_dir: Path, disk_dir: Path) -> None:
    nvme = disk_dir / "fresh"
    settings = config(pool_dir, nvme_dir=str(nvme), nvme_size="64MiB", nvme_reserve=0, trace_file=str(disk_dir / "t"))
    assert settings.check_machine() == []
    assert nvme.is_dir(), "a missing directory below one that exists is made"
    assert Config.parse("{}").check_machine() == []


def test_a_tier_that_will_hold_nothing_is_told_before_the_start(pool_dir: Path, disk_dir: Path) -> None:
    settings = config(pool_dir, nvme_dir=str(disk_dir), nvme_reserve="4000TiB")
    (warning,) = settings.check_machine()
    assert all(word in warning for word in ("nvme_dir", "hold nothing", "free", "nvme_reserve"))


def test_directories_without_rights_are_told(pool_dir: Path, disk_dir: Path) -> None:
    import os

    if os.geteuid() == 0:
        program = (
            "import os, sys; os.setgid(65534); os.setuid(65534)\n"
            "from kvcellar._native import Config\n"
            "from kvcellar import ConfigError\n"
            "try:\n    Config.parse(sys.argv[1]).check_machine()\n"
            "except ConfigError as error:\n    print(error)\n"
        )
        pool_dir.chmod(0o755)
        done = subprocess.run(
            [sys.executable, "-c", program, json.dumps({"pool_dir": str(pool_dir)})],
            capture_output=True,
            text=True,
            check=False,
        )
        if "ModuleNotFoundError" in done.stderr or "PermissionError" in done.stderr:
            pytest.skip("another user cannot read this package")
        text = done.stdout
    else:
        disk_dir.chmod(0o500)
        with pytest.raises(ConfigError) as caught:
            config(pool_dir, nvme_dir=str(disk_dir)).check_machine()
        text = str(caught.value)
    assert "cannot be written to by this user" in text and "rights" in text, text


def test_engines_share_a_size_and_the_second_model_learns_it(pool_dir: Path) -> None:
    ranks = json.dumps([{"block_bytes": [2 * PAGE], "replica_of": [None]}])
    first, second, third = (TierEngine(config(pool_dir), GROUPING) for _ in range(3))
    one = first.open_pool(ranks, '{"weights": "a"}', True, lambda done, total: None, engines=2)
    two = second.open_pool(ranks, '{"weights": "b"}', True, lambda done, total: None, engines=2)
    assert one.bytes + two.bytes <= 1 << 20 and one.slots == two.slots
    assert one.warnings == two.warnings == [] and one.removed == []
    with pytest.raises(ConfigError, match=r"dram_size.*process \d+ has.*Write a larger"):
        third.open_pool(ranks, '{"weights": "c"}', True, lambda done, total: None)
    first.close()
    report = third.open_pool(ranks, '{"weights": "c"}', True, lambda done, total: None)
    assert len(report.removed) == 1 and "removed 1 leftover" in report.removed[0]
    assert len(report.warnings) == 1 and "dram_size" in report.warnings[0]


@pytest.mark.parametrize(
    "command",
    [
        ["pool", "ls", "--pool-dir"],
        ["pool", "rm", "--all", "--pool-dir"],
        ["store", "ls"],
        ["store", "stat"],
        ["store", "verify"],
        ["store", "drop", "--yes"],
        ["bench", "compression"],
    ],
)
def test_a_directory_that_is_not_there_is_no_empty_one(command: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command([*command, "/nonexistent/kvcellar"]) == 1
    assert "/nonexistent/kvcellar" in capfd.readouterr().err


def test_a_store_in_use_is_passed_over_unless_it_is_asked_for(
    pool_dir: Path, disk_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    engine = TierEngine(config(pool_dir, nvme_dir=str(disk_dir), nvme_size="64MiB", nvme_reserve=0), GROUPING)
    open_pool(engine)
    assert run_command(["store", "verify", str(disk_dir), "--json"]) == 0
    told = capfd.readouterr()
    (report,) = json.loads(told.out)
    assert report["skipped"] and report["error"] is None and report["contents"] is None
    assert run_command(["store", "verify", str(disk_dir)]) == 0
    assert "is skipped" in capfd.readouterr().err
    assert run_command(["store", "verify", str(disk_dir), report["name"]]) == 1
    engine.close()
    assert run_command(["store", "verify", str(disk_dir)]) == 0


def test_missing_rights_name_the_path_and_the_remedy() -> None:
    engine = TierEngine(config(Path("/proc")), GROUPING)
    with pytest.raises(SystemRefusedError, match=r"/proc/kvcellar-.*pool_dir"):
        open_pool(engine)


def test_a_pool_directory_that_others_may_enter_is_refused(pool_dir: Path) -> None:
    import os

    (pool_dir / f"kvcellar-{os.geteuid()}").mkdir(mode=0o755)
    with pytest.raises(ConfigError, match=r"pool_dir.*not a private directory"):
        open_pool(TierEngine(config(pool_dir), GROUPING))


@pytest.mark.parametrize("version", ["0.30.1", "0.34.0", "1.0.0", "nonsense"])
def test_an_unsupported_vllm_names_the_window(version: str) -> None:
    with pytest.raises(UnsupportedError, match=r"0\.31 to 0\.33"):
        window.check(version)


@pytest.mark.parametrize("version", ["0.31.0", "0.32.0+cpu", "0.33.1rc1"])
def test_supported_vllm_versions_are_read(version: str) -> None:
    assert window.check(version)[0] == 0


def test_wrong_controls_are_named() -> None:
    with pytest.raises(ConfigError, match="`store`"):
        check_controls('{"stor": true}')


def test_nobody_waits_for_ever_for_a_log_line() -> None:
    assert next_log_line(0.0) is None
    with pytest.raises(ConfigError, match="timeout_s"):
        next_log_line(-1.0)


def test_nonsense_through_the_border_is_an_error_and_no_crash(pool_dir: Path) -> None:
    engine = TierEngine(config(pool_dir), GROUPING)
    engine.add_request("r", None, "")
    with pytest.raises(ValueError, match="16 or 32 bytes"):
        engine.lookup("r", 100, 0, [b"short"])
    with pytest.raises(KvcellarError):
        TierEngine(config(pool_dir), "{}")
    with pytest.raises(ConfigError, match="request_id"):
        engine.add_request("x" * 5000, None, "")
    worker = CopyWorker(config(pool_dir), 0, json.dumps([[view(ctypes.create_string_buffer(PAGE), 1)]]))
    with pytest.raises(DataLostError):
        worker.begin_step(b"no plan at all")
    with pytest.raises(DataLostError):
        worker.attach("{}")


def test_the_command_shows_pools_and_refuses_wrong_usage(pool_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    engine = TierEngine(config(pool_dir), GROUPING)
    open_pool(engine)
    assert run_command(["pool", "ls", "--json", "--pool-dir", str(pool_dir)]) == 0
    (entry,) = json.loads(capfd.readouterr().out)
    assert entry["state"] == "used"
    assert entry["facts"]["model"] == "test"
    assert run_command(["pool", "rm", entry["name"], "--pool-dir", str(pool_dir)]) == 1
    assert str(entry["owner_pid"]) in capfd.readouterr().err
    engine.close()
    assert run_command(["pool", "rm", "--all", "--pool-dir", str(pool_dir)]) == 0
    assert not list(pool_dir.rglob("*.pool"))
    assert run_command(["pool", "rm"]) == 2
    assert run_command(["nonsense"]) == 2


def test_without_keep_pool_the_name_goes_once_workers_are_attached(pool_dir: Path) -> None:
    engine = TierEngine(config(pool_dir, keep_pool=False), GROUPING)
    open_pool(engine)
    assert list(pool_dir.rglob("*.pool"))
    engine.attached()
    assert not list(pool_dir.rglob("*.pool"))


def view(memory: "ctypes.Array[ctypes.c_char]", blocks: int, offset: int = 0) -> dict[str, int]:
    address = ctypes.addressof(memory) + offset
    return {
        "address": address,
        "stride_bytes": PAGE,
        "page_bytes": PAGE,
        "pages_per_block": 1,
        "pages": blocks,
    }


def hashes(count: int) -> list[bytes]:
    return [hashlib.sha256(number.to_bytes(4, "big")).digest() for number in range(count)]


class Layers:
    """Two layers of KV memory, filled with bytes that tell block and layer apart."""

    def __init__(self) -> None:
        self.memory = ctypes.create_string_buffer(2 * BLOCKS * PAGE)
        for block in range(BLOCKS):
            for layer in range(2):
                self.write(layer, block, bytes([16 * layer + block]) * PAGE)

    def views(self) -> str:
        return json.dumps([[view(self.memory, BLOCKS), view(self.memory, BLOCKS, BLOCKS * PAGE)]])

    def write(self, layer: int, block: int, content: bytes) -> None:
        ctypes.memmove(ctypes.addressof(self.memory) + (layer * BLOCKS + block) * PAGE, content, PAGE)

    def read(self, layer: int, block: int) -> bytes:
        return ctypes.string_at(ctypes.addressof(self.memory) + (layer * BLOCKS + block) * PAGE, PAGE)


def wait_until_idle(engine: TierEngine) -> None:
    end = time.monotonic() + deadline(30.0)
    while time.monotonic() < end:
        if dict(engine.gauges())["filling_slots"] == 0 or not engine.pending_work():
            return
        time.sleep(0.001)
    pytest.fail("offloads never became visible")


@pytest.mark.parametrize("verify", [False, True])
def test_a_blocks_whole_way_in_one_process_and_over_a_restart(  # noqa: PLR0915  (one story)
    pool_dir: Path, verify: bool
) -> None:
    settings = config(pool_dir, verify_loads=verify)
    layers = Layers()
    engine, worker = TierEngine(settings, GROUPING), CopyWorker(settings, 0, layers.views())
    assert worker.block_bytes == [2 * PAGE]
    open_pool(engine)
    ticket = engine.ticket()
    assert ticket is not None
    worker.attach(ticket)

    known = hashes(3)
    engine.add_request("first", None, "")
    assert engine.lookup("first", 60, 0, known) == 0
    engine.admit("first", 0, [])
    tokens = list(range(48))
    plan, _ = engine.step([("first", [], 0, tokens, [(0, [1, 2, 3], [])])], [])
    worker.begin_step(plan)
    worker.start_loads()
    worker.finish_step()
    while engine.pending_work() and dict(engine.gauges())["filling_slots"]:
        time.sleep(0.001)
    (stored,) = engine.take_events(False)
    assert isinstance(stored, StoredRun)
    assert (stored.hashes, stored.tokens, stored.parent) == (known, tokens, None)
    engine.finish("first", 60, 60, None)

    def load(request: str) -> None:
        engine.add_request(request, None, "")
        # 49 tokens: three whole blocks and one token to compute. 48: one block less.
        assert engine.lookup(request, 48, 0, known) == 32
        assert engine.lookup(request, 49, 0, []) == 48
        engine.admit(request, 48, [[5, 6, 7]])
        gauges = dict(engine.gauges())
        assert (gauges["pins"], gauges["leases"]) == (3, 1)
        worker.begin_step(engine.step([], [])[0])
        worker.start_loads()
        finished: list[str] = []
        while not finished:
            finished, failed = worker.take_results()
            assert not failed
        assert finished == [request]
        engine.loads_ended(finished, [])
        for layer in range(2):
            for source, target in ((1, 5), (2, 6), (3, 7)):
                assert layers.read(layer, target) == bytes([16 * layer + source]) * PAGE
        gauges = dict(engine.gauges())
        assert (gauges["pins"], gauges["leases"], gauges["fences"]) == (0, 0, 0)

    load("second")
    worker.release(5.0)
    engine.close()

    for block in (5, 6, 7):
        for layer in range(2):
            layers.write(layer, block, bytes(PAGE))
    engine, worker = TierEngine(settings, GROUPING), CopyWorker(settings, 0, layers.views())
    open_pool(engine)
    ticket = engine.ticket()
    assert ticket is not None
    worker.attach(ticket)
    assert [run.tokens for run in engine.take_events(False) if isinstance(run, StoredRun)] == [tokens]
    load("third")
    report = engine.reset()
    assert (report.blocks_dropped_dram, report.blocks_dropped_nvme, report.kept) == (3, 0, False)
    assert report.bytes > 0
    engine.add_request("fourth", None, "")
    assert engine.lookup("fourth", 49, 0, known) == 0
    worker.release(0.0)
    engine.close()
    assert not Path(json.loads(ticket)["path"]).exists(), "what no start can adopt takes no memory"
    engine = TierEngine(settings, GROUPING)
    open_pool(engine)
    engine.add_request("fifth", None, "")
    assert engine.lookup("fifth", 49, 0, known) == 0, "a reset must outlive the engine"
