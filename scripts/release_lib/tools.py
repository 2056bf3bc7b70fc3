"""Tools of a release, in a virtual environment of its own: nothing of the machine is changed but Rust's targets."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".cache" / "release"
VENV = FOLDER / "venv"
PACKAGES = ("maturin==1.16.0", "ziglang==0.15.2", "cargo-zigbuild==0.24.1")
# Writes bills of materials in CycloneDX's form.
BILLS = ("cargo-cyclonedx", "0.5.7")


def environment() -> dict[str, str]:
    """This process's, with the tools first on the path."""
    path = os.pathsep.join([str(VENV / "bin"), str(FOLDER / "tools" / "bin"), os.environ.get("PATH", "")])
    return os.environ | {"PATH": path}


def run(*command: str, cwd: Path = ROOT, **variables: str) -> None:
    """Run a command to its good end.

    Raises:
        subprocess.CalledProcessError: it ended otherwise.
    """
    subprocess.run(command, check=True, cwd=cwd, env=environment() | variables)


def install(triples: list[str]) -> None:
    """What is missing of the tools."""
    if not (VENV / "bin" / "cargo-zigbuild").exists():
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
        run(str(VENV / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PACKAGES)
    if not (FOLDER / "tools" / "bin" / BILLS[0]).exists():
        name, version = BILLS
        run("cargo", "install", "--locked", "--quiet", "--root", str(FOLDER / "tools"), "--version", version, name)
    for triple in triples:
        run("rustup", "target", "add", triple)
