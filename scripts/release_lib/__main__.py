"""Makes what a release consists of, and checks that it fits and works."""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from release_lib import elf, licences, tools, trial
from release_lib.target import GLIBC, TARGETS, Target

PYTHONS = ["3.11", "3.12", "3.13"]
MODULE, COMMAND = "kvcellar/_native.abi3.so", "kvcellar/bin/kvcellar"
# What every such system has. Anything else would have to be brought along.
LIBRARIES = frozenset(
    {"libc.so.6", "libgcc_s.so.1", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1"}
    | {"ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
)


class Unfit(Exception):
    """A wheel that must not be published."""


def build(target: Target, out: Path) -> Path:
    """The wheel, for systems as old as they may be."""
    with tempfile.TemporaryDirectory(prefix="kvcellar-release-", dir=tools.FOLDER) as folder:
        arguments = f"--locked --zig --compatibility {target.manylinux} --target {target.triple}"
        pip = [str(tools.VENV / "bin" / "python"), "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
        tools.run(*pip, "--quiet", "--wheel-dir", folder, str(tools.ROOT), MATURIN_PEP517_ARGS=arguments)
        (built,) = Path(folder).glob("*.whl")
        return Path(shutil.move(built, out / built.name))


def check_files(wheel: Path, target: Target, out: Path) -> Path:
    """Both binaries fit the platform that the wheel names. The command is put beside it.

    Raises:
        Unfit: they do not.
    """
    if f"{target.manylinux}_{target.machine}" not in wheel.name:
        message = f"{wheel.name} is not for {target.manylinux}_{target.machine}"
        raise Unfit(message)
    version = wheel.name.split("-")[1]
    command = out / f"kvcellar-{version}-linux-{target.machine}"
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        for name in (MODULE, COMMAND):
            path = Path(archive.extract(name, folder))
            needs = elf.needs(path)
            wrong = needs.libraries - LIBRARIES
            if needs.machine != target.elf or needs.glibc > GLIBC or wrong:
                message = f"{name}: machine {needs.machine}, glibc {needs.glibc}, libraries {sorted(wrong)}"
                raise Unfit(message)
        shutil.copy(Path(folder) / COMMAND, command)
    command.chmod(0o755)
    return command


def check_installed(wheel: Path, target: Target) -> None:
    """It works in each Python that is here."""
    if not target.is_here:
        print(f"  {target.machine}: not run, this machine cannot")
        return
    for version, python in trial.pythons(PYTHONS).items():
        if python is None:
            print(f"  Python {version}: not tried, there is none here")
        else:
            print(f"  Python {version}: kvcellar {trial.tried(wheel, python)} installs alone and works", flush=True)


def write_bills(target: Target, out: Path) -> None:
    """Bills of materials of the module and the command, and the licences."""
    arguments = ["--format", "json", "--target", target.triple, "--override-filename", "release-bill"]
    for crate in ("python", "command"):
        manifest = tools.ROOT / "src" / crate / "Cargo.toml"
        tools.run("cargo", "cyclonedx", "--quiet", "--manifest-path", str(manifest), *arguments)
        made = list((tools.ROOT / "src").glob("*/release-bill.json"))
        shutil.copy(manifest.with_name("release-bill.json"), out / f"kvcellar-{crate}-{target.machine}.cyclonedx.json")
        for file in made:
            file.unlink()
    unnamed = licences.write(out / f"THIRD-PARTY-LICENSES-{target.machine}.txt", target.triple)
    if unnamed:
        message = f"{unnamed} packages declare no licence"
        raise Unfit(message)


def write_sums(out: Path) -> None:
    """SHA-256 of everything, as sha256sum reads it."""
    files = sorted(file for file in out.iterdir() if file.is_file() and file.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files]
    (out / "SHA256SUMS").write_text("".join(lines))
    for file in files:
        print(f"  {file.stat().st_size / 1e6:8.1f} MB  {file.name}")


def main() -> int:
    """Exit status 0 when everything was made and fits."""
    parser = argparse.ArgumentParser(prog="scripts/release", description="Make wheels, program, bills and licences.")
    parser.add_argument("--machine", choices=[*TARGETS, "all"], default="all")
    parser.add_argument("--out", type=Path, default=tools.ROOT / "dist" / "release")
    options = parser.parse_args()
    chosen = list(TARGETS.values()) if options.machine == "all" else [TARGETS[options.machine]]
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    tools.FOLDER.mkdir(parents=True, exist_ok=True)
    try:
        print("release: tools", flush=True)
        tools.install([target.triple for target in chosen])
        for target in chosen:
            print(f"release: {target.triple}, a build of some minutes", flush=True)
            wheel = build(target, options.out)
            check_files(wheel, target, options.out)
            check_installed(wheel, target)
            write_bills(target, options.out)
    except subprocess.CalledProcessError as error:
        words = (error.stderr or "").strip()
        print(f"release: {error}{': ' + words if words else ''}", file=sys.stderr)
        return 1
    except (Unfit, ValueError) as error:
        print(f"release: {error}", file=sys.stderr)
        return 1
    write_sums(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
