"""What `scripts/gpu-bundle` does to files: code of other GPUs goes, all else stays, archives are the same each time."""

import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from gpu_bundle_lib import __main__ as bundle
from gpu_bundle_lib import parts, unpack
from gpu_bundle_lib.archives import contents, pack
from gpu_bundle_lib.fatbin import ELF, MAGIC, PTX, NoFatbinError, keep_only


def entry(kind: int, architecture: int, code: bytes) -> bytes:
    header = struct.pack("<HHIQQII", kind, 0, 64, len(code), 0, 0, architecture)
    return header.ljust(64, b"\0") + code


def container(*entries: bytes) -> bytes:
    body = b"".join(entries)
    return struct.pack("<IHHQ", MAGIC, 1, 16, len(body)) + body


def elf(fatbin: bytes, section: bytes = b".nv_fatbin") -> bytes:
    """The least of an ELF file: a header, the names of sections, the section, and the table of both."""
    names = b"\0.shstrtab\0" + section + b"\0"
    names_at, body_at = 64, 64 + len(names)
    table_at = body_at + len(fatbin)
    header = bytearray(64)
    struct.pack_into("<Q", header, 0x28, table_at)
    struct.pack_into("<HHH", header, 0x3A, 64, 2, 0)
    table = b"".join(
        struct.pack("<IIQQQQ", name, 0, 0, 0, offset, size).ljust(64, b"\0")
        for name, offset, size in ((1, names_at, len(names)), (11, body_at, len(fatbin)))
    )
    return bytes(header) + names + fatbin + table


def test_code_of_other_gpus_goes_and_all_else_stays_where_it_is() -> None:
    native = container(entry(ELF, 80, b"A" * 40), entry(ELF, 90, b"B" * 40), entry(PTX, 90, b"C" * 40))
    # No code for the device: the driver compiles the PTX.
    foreign = container(entry(ELF, 80, b"D" * 40), entry(PTX, 80, b"E" * 40))
    whole = elf(native + foreign)
    pruned, kernels = keep_only(whole, 90)
    assert kernels == 1
    assert len(pruned) == len(whole)
    assert [letter for letter in b"ABCDE" if bytes([letter]) * 40 in pruned] == list(b"BE")
    changed = [at for at, (old, new) in enumerate(zip(whole, pruned, strict=True)) if old != new]
    assert all(whole[at] in b"ACD" and pruned[at] == 0 for at in changed)
    assert len(changed) == 120


def test_a_file_without_code_for_gpus_is_refused() -> None:
    with pytest.raises(NoFatbinError):
        keep_only(elf(b"", section=b".text"), 90)


def test_archives_are_the_same_each_time_and_come_out_whole(tmp_path: Path) -> None:
    files = {"site/b.py": b"b = 1\n", "site/a/c.bin": bytes(range(256)) * 100}
    first = pack(tmp_path / "first.tar.xz", files)
    second = pack(tmp_path / "second.tar.xz", dict(reversed(files.items())))
    assert first.read_bytes() == second.read_bytes()
    second.unlink()
    (tmp_path / "unpack.py").write_bytes(Path(unpack.__file__).read_bytes())
    subprocess.run([sys.executable, str(tmp_path / "unpack.py"), str(tmp_path / "out")], check=True)
    assert {name: (tmp_path / "out" / name).read_bytes() for name in files} == files


def test_a_wheel_gives_what_it_would_install_among_packages(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as wheel:
        wheel.writestr("p/__init__.py", "")
        wheel.writestr("p-1.data/purelib/p/more.py", "")
        wheel.writestr("p-1.data/scripts/p", "")
    assert set(contents(tmp_path / "w.whl")) == {"p/__init__.py", "p/more.py"}


def test_what_is_too_large_to_travel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "archive").write_bytes(b"x" * 1000)
    monkeypatch.setattr(bundle, "checkout_bytes", lambda: 500)
    monkeypatch.setattr(bundle, "MIB", 1)
    for limit, travel, why in ((1000, 1500, None), (999, 1500, "the bundle has"), (1000, 1499, "bundle and working")):
        monkeypatch.setattr(bundle, "BUNDLE_MIB_MAX", limit)
        monkeypatch.setattr(bundle, "TRAVEL_MIB_MAX", travel)
        found = bundle.check_size(tmp_path)
        assert found is None if why is None else found is not None and found.startswith(why)


def test_the_plugin_is_a_package_that_vllm_finds() -> None:
    made = parts.plugin()
    points = next(content for name, content in made.items() if name.endswith("entry_points.txt")).decode()
    module = points.splitlines()[1].split(" = ")[1].split(":")[0]
    assert f"{parts.SITE}/{module}.py" in made
    assert b"def register()" in made[f"{parts.SITE}/{module}.py"]
