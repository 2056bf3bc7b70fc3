"""The tiers where the system gives less: they open with what there is, and say what is small and what to do."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.vllm import confined
from tests.vllm.mounts import fill, small_disk
from tests.vllm.places import ROOT, temporary_disk_dir, temporary_pool_dir

MIB = 1 << 20
POPULATING = ["no-populate-einval", "no-populate-eperm"]

by_root = pytest.mark.skipif(os.geteuid() != 0, reason="a mount namespace of its own can be made by root only")


def opened(limits: list[str], **config: object) -> dict[str, Any]:
    """What a program under these limits says of the tiers that it opened."""
    command = [sys.executable, "-m", "tests.python.opened", json.dumps(config)]
    if limits:
        command = [sys.executable, confined.__file__, ",".join(limits), *command]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, f"ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    said: dict[str, Any] = json.loads(done.stdout)
    return said


@by_root
@pytest.mark.parametrize("populating", POPULATING)
def test_a_pool_in_little_shared_memory_leaves_what_vllm_talks_through(populating: str) -> None:
    """A process that finds no page there is ended by SIGBUS."""
    with temporary_disk_dir() as disk:
        tiers = {"dram_size": "1GiB", "nvme_dir": str(disk), "nvme_size": "256MiB", "nvme_reserve": 0}
        said = opened(["small-shm", "no-ring", populating], **tiers)
    assert confined.SHARED_BYTES // 2 < said["bytes"] < confined.SHARED_BYTES * 4 // 5
    assert said["bound"] == "free shared memory"
    for told in (said["early"], said["warnings"]):
        assert len(told) == 1 and "dram_size" in told[0] and "--shm-size" in told[0], told
    assert said["disk"]["engine"] == "threads" and said["disk"]["blocks"] > 0


@by_root
def test_beside_a_pool_in_shared_memory_there_is_room_for_vllm_to_start_again() -> None:
    """It asks for what a queue between its processes may come to, and the pool of the last start is still there."""
    said = opened(["more-shm"], dram_size="1GiB")
    assert said["bound"] == "free shared memory" and said["bytes"] > 128 * MIB
    assert said["queue"]["free"] > said["queue"]["bytes"] + 64 * MIB, said


@by_root
@pytest.mark.parametrize("populating", POPULATING)
def test_a_control_groups_limit_bounds_a_pool_and_is_named(populating: str) -> None:
    said = opened(["small-shm", "small-group", populating], dram_size="1GiB")
    assert confined.GROUP_ROOM_BYTES * 4 // 5 < said["bytes"] < confined.GROUP_ROOM_BYTES
    (told,) = said["warnings"]
    assert "control group" in told and "--memory" in told


@by_root
@pytest.mark.parametrize("shared", ["more-shm", "huge-shm"])
def test_a_pool_takes_huge_pages_where_they_are_given_and_says_so(shared: str) -> None:
    """Most of them: memory may be too scattered for some."""
    said = opened([shared], dram_size="64MiB")
    wanted = {"more-shm": (0, 0), "huge-shm": (said["bytes"] // 2, said["bytes"])}[shared]
    assert wanted[0] <= said["huge"] <= wanted[1], said


@pytest.mark.parametrize("made", [False, True], ids=["no store", "a store's folder"])
def test_a_disk_that_is_full_to_its_last_block_leaves_memory_serving(made: bool) -> None:
    with temporary_pool_dir() as pool_dir, small_disk(128 * MIB) as disk:
        if made:
            Path(disk, f"kvcellar-{os.geteuid()}").mkdir(mode=0o700)
        fill(disk)
        tiers = {"dram_size": "8MiB", "pool_dir": str(pool_dir), "nvme_dir": str(disk), "nvme_size": "64MiB"}
        said = opened([], **tiers, nvme_reserve=0)
    assert said["bytes"] > 7 * MIB
    assert len(said["early"]) == 1 and "will hold nothing" in said["early"][0]
    told = said["disk"]["warnings"]
    assert len(told) == 1 and "the nvme tier holds nothing" in told[0] and "nvme_dir" in told[0], told
