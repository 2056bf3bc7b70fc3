"""The right to erasure under the real vLLM: one `cache_salt` is nowhere, others are as before."""

import array
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.deadlines import deadline
from tests.vllm.places import pool_files, temporary_disk_dir, temporary_pool_dir
from tests.vllm.prompts import prompt
from tests.vllm.server import BLOCK_TOKENS, Server, completion, open_server

BLOCKS = 6
HIT_TOKENS = BLOCKS * BLOCK_TOKENS
SETTLE_S = 60.0

pytestmark = [pytest.mark.usefixtures("vllm_installed"), pytest.mark.e2e]


@pytest.fixture
def pool_dir() -> Iterator[Path]:
    with temporary_pool_dir() as path:
        yield path


@pytest.fixture
def nvme_dir() -> Iterator[Path]:
    with temporary_disk_dir() as path:
        yield path


def ask(server: Server, tokens: Sequence[int], salt: str, controls: dict[str, object] | None = None) -> int:
    """One request with a salt. How many of its tokens were there."""
    response = server.client.post("/v1/completions", json={**completion(tokens, 2, controls), "cache_salt": salt})
    response.raise_for_status()
    return int((response.json()["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0)


def found(server: Server, tokens: Sequence[int], salt: str) -> int:
    """How many of a request's tokens our tiers have. Nothing is kept of it, and vLLM itself has nothing."""
    assert server.reset()
    return ask(server, tokens, salt, {"store": False})


def forget(*where: str, salt: str) -> tuple[int, list[dict[str, Any]]]:
    """The command's exit code, and what it says of each engine and each file."""
    command = [sys.executable, "-m", "kvcellar", "forget", "--salt-file", "-", "--json", *where]
    patience_s = deadline(SETTLE_S)
    done = subprocess.run(command, input=salt + "\n", capture_output=True, text=True, timeout=patience_s, check=False)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def warm(file: Path, server: Server, tokens: Sequence[int], salt: str) -> dict[str, Any]:
    """Sends a prompt as `kvcellar warm` does. What the command says."""
    file.write_text(json.dumps({"prompt": list(tokens), "cache_salt": salt}) + "\n")
    command = [sys.executable, "-m", "kvcellar", "warm", str(file), "--url", server.url, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=deadline(SETTLE_S), check=True)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def traces(tokens: Sequence[int], pool_dir: Path, nvme_dir: Path) -> tuple[int, int]:
    """How often a prompt's blocks lie in memory and on disk, by the token ids in their descriptors."""
    blocks = [tokens[start : start + BLOCK_TOKENS] for start in range(0, HIT_TOKENS, BLOCK_TOKENS)]
    needles = [array.array("I", block).tobytes() for block in blocks]
    counts = []
    for files in (pool_files(pool_dir), sorted(nvme_dir.rglob("segment-*"))):
        whole = [path.read_bytes() for path in files]
        counts.append(sum(data.count(needle) for data in whole for needle in needles))
    return counts[0], counts[1]


def test_a_salt_is_forgotten_by_both_tiers_and_by_the_next_start(
    tmp_path: Path, pool_dir: Path, nvme_dir: Path, seed: int
) -> None:
    draw = random.Random(f"forget-{seed}")
    hers, his = (prompt(draw, HIT_TOKENS + 5) for _ in range(2))
    cellar = {"dram_size": "128MiB", "nvme_dir": str(nvme_dir), "nvme_size": "256MiB", "write_through": True}
    (tmp_path / "first").mkdir()
    with open_server(tmp_path / "first", pool_dir, cellar=cellar) as server:
        ask(server, hers, "ada")
        told = warm(tmp_path / "prompts.jsonl", server, his, "bob")
        assert (told["prompts"], told["tokens"], told["failed"]) == (1, len(his), [])
        end = time.monotonic() + deadline(SETTLE_S)
        while server.settle().cellar("nvme_blocks") < 2 * BLOCKS:
            assert time.monotonic() < end, server.log_tail()
        assert (found(server, hers, "ada"), found(server, his, "bob")) == (HIT_TOKENS, HIT_TOKENS)
        assert warm(tmp_path / "prompts.jsonl", server, his, "bob")["cached_tokens"] == HIT_TOKENS
        assert all(traces(hers, pool_dir, nvme_dir)), "they lie in both: the search can find them"
        code, rows = forget("--url", server.url, salt="ada")
        assert code == 0, rows
        told = rows[0]["engine"]
        assert (told["dram_blocks"], told["nvme_blocks"], told["failed"]) == (BLOCKS, BLOCKS, 0)
        assert traces(hers, pool_dir, nvme_dir) == (0, 0)
        assert all(traces(his, pool_dir, nvme_dir))
        assert (found(server, hers, "ada"), found(server, his, "bob")) == (0, HIT_TOKENS)
        assert server.settle().cellar("dropped_blocks_total", reason="forgotten") == 2 * BLOCKS
        code, rows = forget("--url", server.url, salt="nobody")
        assert code == 0 and rows[0]["engine"]["dram_blocks"] == 0
        code, rows = forget("--pool-dir", str(pool_dir), "--nvme-dir", str(nvme_dir), salt="bob")
        assert code == 1 and all("--url" in row["error"] for row in rows), "the files are in use"
    (tmp_path / "second").mkdir()
    with open_server(tmp_path / "second", pool_dir, cellar=cellar) as server:
        assert (found(server, hers, "ada"), found(server, his, "bob")) == (0, HIT_TOKENS)
        assert traces(hers, pool_dir, nvme_dir) == (0, 0)
    end = time.monotonic() + deadline(SETTLE_S)
    code, rows = 1, []
    # The last threads of a worker that has ended may hold its files for a moment.
    while code and time.monotonic() < end:
        code, rows = forget("--pool-dir", str(pool_dir), "--nvme-dir", str(nvme_dir), salt="bob")
    assert code == 0, rows
    # What an earlier try has forgotten already, it does not count again.
    assert all(row.get("pool", row.get("store"))["blocks"] in {0, BLOCKS} for row in rows), rows
    assert len(rows) == 2, rows
    assert traces(his, pool_dir, nvme_dir) == (0, 0)
