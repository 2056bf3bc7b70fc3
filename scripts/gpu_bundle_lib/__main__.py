"""Makes the bundle: what does not change is cached, what is built is built beside what is packed."""

import argparse
import hashlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from gpu_bundle_lib import complete, parts
from gpu_bundle_lib.archives import Files, pack
from gpu_bundle_lib.packages import BROUGHT, VLLM
from gpu_bundle_lib.parts import ROOT

MIB = 1 << 20
BUNDLE_MIB_MAX = 60
# What may travel to such a machine in one go: the working tree and the bundle.
TRAVEL_MIB_MAX = 64


class Bundle:
    """A bundle in the making.

    Attributes:
        cache: archives that do not change, by what they are made of, and downloads.
    """

    def __init__(self, cache: Path, *, whole: bool) -> None:
        self.cache = cache
        self._whole = whole
        self._started = time.monotonic()
        (cache / "downloads").mkdir(parents=True, exist_ok=True)

    def say(self, what: str) -> None:
        """One line, with the seconds so far."""
        print(f"{time.monotonic() - self._started:6.0f} s  {what}", flush=True)

    def _packed(self, name: str, made_of: str, make: Callable[[], Files]) -> Path:
        """An archive of the cache."""
        # The code that makes it counts, too.
        code = "".join(
            (Path(__file__).parent / f"{module}.py").read_text() for module in ("parts", "archives", "fatbin")
        )
        digest = hashlib.sha256(f"{made_of} {code}".encode()).hexdigest()[:16]
        path = self.cache / f"{name}-{digest}.tar.xz"
        if path.exists():
            self.say(f"{name}: cached")
            return path
        for old in self.cache.glob(f"{name}-*.tar.xz"):
            old.unlink()
        pack(path, make())
        self.say(f"{name}: {path.stat().st_size / MIB:.1f} MiB")
        return path

    def vllm_and_others(self) -> dict[str, Path]:
        """What does not change with this checkout."""
        downloads = self.cache / "downloads"
        parts.wheel_of_vllm(downloads)
        self.say("vLLM's wheel is here")
        made: dict[str, tuple[str, Callable[[], Files]]] = {
            "compiled": (f"{VLLM} {self._whole}", lambda: parts.compiled(downloads, whole=self._whole)),
            "flash": (VLLM, lambda: parts.flash(downloads)),
            "vllm": (VLLM, lambda: parts.python_of_vllm(downloads)),
            "others": (" ".join(BROUGHT), lambda: parts.others(downloads)),
        }
        with ThreadPoolExecutor(2) as pool:
            packed = {name: pool.submit(self._packed, name, *how) for name, how in made.items()}
            return {name: future.result() for name, future in packed.items()}

    def ours(self) -> dict[str, Files]:
        """What this checkout builds."""
        built: dict[str, Files] = {"kvcellar": parts.kvcellar(self.cache)}
        self.say("the wheel is built")
        built["binaries"] = parts.binaries()
        self.say("the test binaries are built")
        built["plugin"] = parts.plugin()
        return built


def checkout_bytes() -> int:
    """What travels beside the bundle: tracked files, and others that git does not ignore."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, check=True, capture_output=True).stdout.split(b"\0")
    paths = [ROOT / name.decode() for name in names if name]
    return sum(path.lstat().st_size for path in paths if path.exists())


def check_size(out: Path) -> str | None:
    """Why it is too large; none: it is not."""
    size, beside = sum(path.stat().st_size for path in out.iterdir()), checkout_bytes()
    print(f"          {out.name}: {size / MIB:.1f} MiB, working tree {beside / MIB:.1f} MiB")
    if size > BUNDLE_MIB_MAX * MIB:
        return f"the bundle has {size / MIB:.1f} MiB, and may have {BUNDLE_MIB_MAX}"
    if size + beside > TRAVEL_MIB_MAX * MIB:
        return f"bundle and working tree have {(size + beside) / MIB:.1f} MiB, and may have {TRAVEL_MIB_MAX}"
    return None


def write(out: Path, archives: dict[str, Path], ours: dict[str, Files]) -> None:
    """A folder with nothing else in it."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for name, path in archives.items():
        shutil.copyfile(path, out / f"{name}.tar.xz")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: pack(out / f"{name}.tar.xz", ours[name]), ours))
    shutil.copyfile(Path(__file__).parent / "unpack.py", out / "unpack.py")
    (out / "commit").write_text(parts.commit() + "\n")


def main() -> int:
    """Make it, and look at it."""
    parser = argparse.ArgumentParser(prog="gpu-bundle")
    parser.add_argument("--out", type=Path, default=ROOT / "dist" / "gpu")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--no-check", action="store_true")
    options = parser.parse_args()
    bundle = Bundle(ROOT / ".cache" / "gpu-bundle", whole=options.whole)
    with ThreadPoolExecutor(3) as pool:
        ours = pool.submit(bundle.ours)
        archives = pool.submit(bundle.vllm_and_others)
        clean: Future[Path | None] | None = None
        if not options.no_check:
            clean = pool.submit(complete.environment, bundle.cache / "machine")
        write(options.out, archives.result(), ours.result())
    bundle.say("the bundle is packed")
    problem = check_size(options.out)
    python = clean.result() if clean is not None else None
    if problem is None and python is not None:
        bundle.say("looking whether it is complete")
        problem = complete.why_not(options.out, python)
    if problem is not None:
        print(f"gpu-bundle: FAILED: {problem}", file=sys.stderr)
        return 1
    if python is None:
        print(f"gpu-bundle: NOT CHECKED for completeness: no Python {complete.PYTHON} (PYTHON312), or --no-check")
    bundle.say(f"done: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
