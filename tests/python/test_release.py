"""What `scripts/release` and the wheel's build are made of: a wheel that would not run somewhere is refused."""

import platform
import sys
import zipfile
from pathlib import Path

import pytest
from release_lib import __main__ as release
from release_lib import elf, licences, trial
from release_lib.target import GLIBC, TARGETS, Target

HERE = TARGETS.get(platform.machine())
PROGRAM = Path(sys.executable).resolve()


def wheel(folder: Path, tag: str, program: bytes) -> Path:
    path = folder / f"kvcellar-1.2.3-cp311-abi3-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in (release.MODULE, release.COMMAND):
            archive.writestr(name, program)
    return path


def test_a_files_needs_are_read() -> None:
    if HERE is None:
        pytest.skip(f"{platform.machine()} is no platform of a wheel")
    needs = elf.needs(PROGRAM)
    assert needs.machine == HERE.elf
    assert (2, 2) <= needs.glibc < (3, 0)
    assert any(name.startswith("libc.so") for name in needs.libraries)
    with pytest.raises(ValueError, match="no ELF file"):
        elf.needs(Path(__file__))


@pytest.mark.parametrize(
    ("target", "tag", "glibc", "wrong"),
    [
        (HERE, None, (9, 9), None),
        (HERE, None, (2, 0), "glibc"),
        (HERE, "linux_x86_64", (9, 9), "is not for manylinux"),
        (Target("riscv64", 243), None, (9, 9), "machine"),
    ],
)
def test_what_would_not_run_elsewhere_is_refused(  # noqa: PLR0917 - pytest gives them by name
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: Target | None,
    tag: str | None,
    glibc: tuple[int, int],
    wrong: str | None,
) -> None:
    if target is None:
        pytest.skip(f"{platform.machine()} is no platform of a wheel")
    monkeypatch.setattr(release, "GLIBC", glibc)
    monkeypatch.setattr(release, "LIBRARIES", elf.needs(PROGRAM).libraries)
    made = wheel(tmp_path, tag or f"{target.manylinux}_{target.machine}", PROGRAM.read_bytes())
    if wrong is None:
        command = release.check_files(made, target, tmp_path)
        assert command.name == f"kvcellar-1.2.3-linux-{target.machine}"
        assert command.stat().st_mode & 0o111
    else:
        with pytest.raises(release.Unfit, match=wrong):
            release.check_files(made, target, tmp_path)


def test_an_unknown_library_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if HERE is None:
        pytest.skip(f"{platform.machine()} is no platform of a wheel")
    monkeypatch.setattr(release, "GLIBC", (9, 9))
    monkeypatch.setattr(release, "LIBRARIES", frozenset({"libnothing.so"}))
    with pytest.raises(release.Unfit, match=r"libc\.so"):
        release.check_files(wheel(tmp_path, f"{HERE.manylinux}_{HERE.machine}", PROGRAM.read_bytes()), HERE, tmp_path)


def test_licences_are_of_what_is_shipped(tmp_path: Path) -> None:
    assert licences.write(tmp_path / "all.txt", "x86_64-unknown-linux-gnu") == 0
    text = (tmp_path / "all.txt").read_text()
    for name in ("pyo3 ", "tokio ", "io-uring "):
        assert f"\n{name}" in text
    assert "\nproptest " not in text and "kvcellar-engine" not in text
    assert text.count("Permission is hereby granted") > 50


def test_interpreters_are_found_by_version() -> None:
    here = "{}.{}".format(*sys.version_info)
    found = trial.pythons([here, "2.1"])
    assert found[here] is not None and found["2.1"] is None


def test_the_command_is_built_for_the_systems_that_the_wheel_names() -> None:
    import wheel_backend

    arguments = ["--release", "--zig", "--compatibility", f"manylinux_{GLIBC[0]}_{GLIBC[1]}"]
    arguments += ["--target", "aarch64-unknown-linux-gnu", "--profile", "dev", "--config", "a=1"]
    shared = wheel_backend._shared(arguments)
    assert shared == ["--target", "aarch64-unknown-linux-gnu", "--profile", "dev", "--config", "a=1"]
    renamed = [wheel_backend._for_glibc(argument, arguments) for argument in shared]
    assert renamed[:2] == ["--target", "aarch64-unknown-linux-gnu.2.28"] and renamed[2:] == shared[2:]
    assert wheel_backend._for_glibc("aarch64-unknown-linux-gnu", []) == "aarch64-unknown-linux-gnu"
