"""The parts of the bundle, as files by name: vLLM in three, packages beside it, kvcellar, test binaries, the plugin."""

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from gpu_bundle_lib import fatbin
from gpu_bundle_lib.archives import contents
from gpu_bundle_lib.packages import BROUGHT, MATURIN, VLLM, download, pip

ROOT = Path(__file__).resolve().parents[2]
SITE = "site"
COMPILED = "vllm/_C_stable_libtorch.abi3.so"
FLASH = "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so"
# Does not load under torch 2.11, or is for another use.
LEFT_OUT = ("vllm/third_party/deep_gemm/", "vllm/third_party/cutlass", "vllm/vllm-rs")
HOPPER = 90
# Fewer kernels than this with code for the device, and the file is not what it was when this was
# written.
KERNELS_MIN = 20
BINARIES = ("copies", "disks")
PLUGIN = "kvcellar_random_weights"


def wheel_of_vllm(downloads: Path) -> Path:
    """vLLM's wheel, downloaded once."""
    if not list(downloads.glob(f"vllm-{VLLM}-*.whl")):
        download(downloads, f"vllm=={VLLM}")
    return next(downloads.glob(f"vllm-{VLLM}-*.whl"))


def compiled(downloads: Path, *, whole: bool) -> dict[str, bytes]:
    """vLLM's kernels, for one architecture unless `whole`."""
    with zipfile.ZipFile(wheel_of_vllm(downloads)) as archive:
        elf = archive.read(COMPILED)
    if whole:
        return {f"{SITE}/{COMPILED}": elf}
    pruned, kernels = fatbin.keep_only(elf, HOPPER)
    if kernels < KERNELS_MIN:
        raise SystemExit(f"gpu-bundle: {kernels} containers of {COMPILED} have code for sm_{HOPPER}: use --whole")
    return {f"{SITE}/{COMPILED}": pruned}


def flash(downloads: Path) -> dict[str, bytes]:
    """FlashAttention 3."""
    with zipfile.ZipFile(wheel_of_vllm(downloads)) as archive:
        return {f"{SITE}/{FLASH}": archive.read(FLASH)}


def python_of_vllm(downloads: Path) -> dict[str, bytes]:
    """vLLM's Python, and its record without the versions it pins: the machine's torch is another."""
    found = {}
    with zipfile.ZipFile(wheel_of_vllm(downloads)) as archive:
        for info in archive.infolist():
            name = info.filename
            if info.is_dir() or name.endswith((".so", "/RECORD")) or name.startswith(LEFT_OUT):
                continue
            content = archive.read(info)
            if name.endswith(".dist-info/METADATA"):
                lines = content.split(b"\n\n")[0].split(b"\n")
                content = b"\n".join(line for line in lines if not line.startswith(b"Requires-Dist")) + b"\n"
            found[f"{SITE}/{name}"] = content
    return found


def others(downloads: Path) -> dict[str, bytes]:
    """What vLLM imports and the machine lacks."""
    folder = downloads / "others"
    if not (folder / "complete").exists():
        download(folder, *BROUGHT)
        (folder / "complete").touch()
    found: dict[str, bytes] = {}
    for wheel in sorted(folder.glob("*.whl")):
        found |= {f"{SITE}/{name}": content for name, content in contents(wheel).items()}
    return found


def plugin() -> dict[str, bytes]:
    """The plugin that draws weights, as an installed package."""
    record = f"{SITE}/{PLUGIN}-0.dist-info"
    entry = f"[vllm.general_plugins]\n{PLUGIN} = {PLUGIN}:register\n"
    return {
        f"{SITE}/{PLUGIN}.py": (Path(__file__).parent / "random_weights.py").read_bytes(),
        f"{record}/METADATA": f"Metadata-Version: 2.1\nName: {PLUGIN}\nVersion: 0\n".encode(),
        f"{record}/entry_points.txt": entry.encode(),
    }


def _stripped(elf: bytes) -> bytes:
    """Without lines and names for debuggers. Backtraces keep the names of functions that are exported."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(elf)
        file.flush()
        subprocess.run(["strip", "--strip-unneeded", file.name], check=True)
        return Path(file.name).read_bytes()


def kvcellar(cache: Path) -> dict[str, bytes]:
    """The wheel of this checkout, built for a release, stripped."""
    tools = cache / "tools"
    if not (tools / "bin" / "maturin").exists():
        subprocess.run([sys.executable, "-m", "venv", str(tools)], check=True)
        pip(tools / "bin" / "python", "install", MATURIN)
    wheels = cache / "wheel"
    for old in wheels.glob("*.whl"):
        old.unlink()
    environment = os.environ | {"PATH": f"{tools / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"}
    build = [str(tools / "bin" / "python"), "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(wheels), str(ROOT)], check=True, env=environment)
    found = contents(next(wheels.glob("*.whl")))
    binary = (".so", "/bin/kvcellar")
    return {
        f"{SITE}/{name}": _stripped(content) if name.endswith(binary) else content for name, content in found.items()
    }


def binaries() -> dict[str, bytes]:
    """Test binaries that another machine's kernel and disk are worth being asked with, stripped."""
    command = ["cargo", "test", "--locked", "--quiet", "--package", "kvcellar-engine", "--no-run"]
    command += ["--message-format", "json", *(argument for name in BINARIES for argument in ("--test", name))]
    done = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    return {f"binaries/{name}": _stripped(Path(path).read_bytes()) for name, path in _built(done.stdout)}


def _built(messages: str) -> Iterator[tuple[str, str]]:
    for line in messages.splitlines():
        told = json.loads(line)
        if told.get("executable") and told["target"]["name"] in BINARIES:
            yield told["target"]["name"], told["executable"]


def commit() -> str:
    """Which sources these are."""
    command = ["git", "-C", os.fspath(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
