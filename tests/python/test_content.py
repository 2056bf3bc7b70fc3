"""What a digest of a file sees: everything in a small one, every tensor of a large one."""

import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kvcellar import content

TENSORS = 20
TENSOR_BYTES = 1 << 20


def safetensors(path: Path, metadata: str = "pt") -> Path:
    """A file too large to be read as a whole."""
    table: dict[str, object] = {"__metadata__": {"format": metadata}}
    for index in range(TENSORS):
        offsets = [index * TENSOR_BYTES, (index + 1) * TENSOR_BYTES]
        table[f"layer.{index}"] = {"dtype": "U8", "shape": [TENSOR_BYTES], "data_offsets": offsets}
    head = json.dumps(table).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for index in range(TENSORS):
            file.write(bytes([index]) * TENSOR_BYTES)
    assert path.stat().st_size > content.WHOLE_BYTES_MAX
    return path


def rewrite(path: Path, at: int, length: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(b"\xff" * length)


def test_a_copy_with_other_time_stamps_is_equal(tmp_path: Path) -> None:
    one, other = safetensors(tmp_path / "a"), safetensors(tmp_path / "b")
    os.utime(other, ns=(1, 1))
    assert content.digest_file(one) == content.digest_file(other)


@pytest.mark.parametrize("index", range(0, TENSORS, 3))
def test_any_tensor_with_other_values_is_seen(tmp_path: Path, index: int) -> None:
    path = safetensors(tmp_path / "a")
    before, start = content.digest_file(path), path.stat().st_size - (TENSORS - index) * TENSOR_BYTES
    rewrite(path, start, TENSOR_BYTES)
    assert content.digest_file(path) != before


def test_the_table_of_tensors_counts(tmp_path: Path) -> None:
    assert content.digest_file(safetensors(tmp_path / "a")) != content.digest_file(safetensors(tmp_path / "b", "np"))


def test_every_byte_of_a_small_file_counts(tmp_path: Path) -> None:
    path = tmp_path / "small"
    seen = set()
    for at in range(0, 3000, 7):
        whole = bytearray(3000)
        whole[at] = 1
        path.write_bytes(whole)
        seen.add(content.digest_file(path))
    assert len(seen) == len(range(0, 3000, 7))


@pytest.mark.parametrize("size", [0, 1, content.WHOLE_BYTES_MAX, content.WHOLE_BYTES_MAX + 1])
def test_files_of_any_size_have_a_digest_that_knows_their_size(tmp_path: Path, size: int) -> None:
    path, longer = tmp_path / "a", tmp_path / "b"
    path.write_bytes(b"\0" * size)
    longer.write_bytes(b"\0" * (size + 1))
    assert content.digest_file(path) != content.digest_file(longer)


@pytest.mark.parametrize("head", [b"\xff" * 8, struct.pack("<Q", 40) + b"{not json", struct.pack("<Q", 3) + b"[1]"])
def test_a_large_file_with_a_strange_head_is_read_like_any_other(tmp_path: Path, head: bytes) -> None:
    path = tmp_path / "a"
    path.write_bytes(head + b"\0" * (content.WHOLE_BYTES_MAX + 1))
    before = content.digest_file(path)
    rewrite(path, path.stat().st_size - 5, 5)
    assert content.digest_file(path) != before


def test_reads_are_bounded_whatever_the_table_says(tmp_path: Path) -> None:
    path = tmp_path / "a"
    table = {f"t{index}": {"data_offsets": [index, index + 1]} for index in range(20_000)}
    head = json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + b"\0" * (content.WHOLE_BYTES_MAX + 1))
    with path.open("rb") as file:
        pieces = list(content._pieces(file.fileno(), path.stat().st_size))
    assert len(pieces) <= 1 + 2 * content.TENSORS_MAX + content.SPREAD_PAGES


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"directory|no regular file"):
        content.digest_file(tmp_path)


def test_a_file_is_known_to_be_older_or_younger_than_a_process(tmp_path: Path) -> None:
    """Written a moment before a process began, and as its first act."""
    older, younger = tmp_path / "older", tmp_path / "younger"
    older.write_text("x")
    time.sleep(0.3)
    program = (
        "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('x')\n"
        "from kvcellar.content import process_start_ns; print(process_start_ns())"
    )
    run = subprocess.run([sys.executable, "-c", program, str(younger)], check=True, capture_output=True, text=True)
    began_ns = int(run.stdout)
    assert older.stat().st_ctime_ns < began_ns < younger.stat().st_ctime_ns
