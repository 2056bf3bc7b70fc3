"""A wheel in a clean virtual environment of one Python: it installs alone, and what users begin with works."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

# Without vLLM, torch or a network: the package, its module, a pool, and the command.
SCRIPT = """
import json, os, sys, tempfile
import kvcellar
from kvcellar._native import Config, TierEngine, next_log_line
assert not [name for name in sys.modules if name.split(".")[0] in ("torch", "vllm")], "importing is not light"
with tempfile.TemporaryDirectory(dir="/dev/shm") as pool_dir:
    config = Config.parse(json.dumps({"dram_size": "64MiB", "pool_dir": pool_dir}))
    config.check_machine()
    assert config.dram_bytes == 64 << 20
try:
    Config.parse(json.dumps({"dram_sise": 1}))
except kvcellar.ConfigError as error:
    assert "dram_size" in str(error)
else:
    raise SystemExit("a mistake was not found")
print(kvcellar.__version__)
"""


def pythons(versions: list[str]) -> dict[str, str | None]:
    """An interpreter of each version on the path; ``None``: there is none that runs."""
    found: dict[str, str | None] = {}
    for version in versions:
        found[version] = next((name for name in _candidates(version) if _is(name, version)), None)
    return found


def _candidates(version: str) -> list[str]:
    # pyenv's own programs answer for a version only when they are asked by its whole name.
    pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    return [f"python{version}", sys.executable, *map(str, pyenv)]


def _is(python: str, version: str) -> bool:
    ask = "import sys; print('{}.{}'.format(*sys.version_info))"
    try:
        done = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=False)
    except OSError:
        return False
    return done.returncode == 0 and done.stdout.strip() == version


def tried(wheel: Path, python: str) -> str:
    """Install and use it. Returns the version that the package and the command both say.

    Raises:
        subprocess.CalledProcessError: a step failed; its own words are on standard error.
        ValueError: the package and the command are of different versions, or the command finds a problem of its own.
    """
    with tempfile.TemporaryDirectory(prefix="kvcellar-trial-") as folder:
        subprocess.run([python, "-m", "venv", folder], check=True)
        inside = Path(folder) / "bin"
        quiet = ["--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
        subprocess.run([inside / "python", "-m", "pip", "install", *quiet, str(wheel)], check=True)
        of_package = _said(folder, inside / "python", "-I", "-c", SCRIPT)
        of_command = _said(folder, inside / "kvcellar", "--version")
        # Its exit code speaks of the machine, not of the wheel.
        doctor = _said(folder, inside / "kvcellar", "doctor", "--json", check=False)
        found = {line["name"] for line in json.loads(doctor)["findings"]}
        if of_command != f"kvcellar {of_package}" or "vllm" not in found:
            message = f"package {of_package!r}, command {of_command!r}, doctor knows {sorted(found)}"
            raise ValueError(message)
        return of_package


def _said(folder: str, program: Path, *arguments: str, check: bool = True) -> str:
    done = subprocess.run([program, *arguments], check=check, capture_output=True, text=True, cwd=folder)
    return done.stdout.strip()
