"""Builds kvcellar's wheel (PEP 517): the extension module, by maturin, and the command, by Cargo, in one package.

The extension is what vLLM loads, and holds the engine alone. The command is a program of its own that holds
everything, ``kvcellar/bin/kvcellar`` in the package. ``MATURIN_PEP517_ARGS`` goes to maturin; what it says of
profile and target counts for the command, too. With ``KVCELLAR_WITHOUT_COMMAND=1`` it is left out: five times
sooner built, and enough to try the engine.
"""

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import maturin

ROOT = Path(__file__).resolve().parents[1]
COMMAND = ROOT / "python" / "kvcellar" / "bin" / "kvcellar"
# Options that Cargo understands as maturin does. Each has a value.
_SHARED = ("--profile", "--config", "--target", "--target-dir")

get_requires_for_build_wheel = maturin.get_requires_for_build_wheel
get_requires_for_build_editable = maturin.get_requires_for_build_editable


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Mapping[str, Any] | None = None) -> str:
    """The folder with the wheel's metadata, below ``metadata_directory``. How it is built changes nothing there."""
    build_arguments = os.environ.pop("MATURIN_PEP517_ARGS", None)
    try:
        name: str = maturin.prepare_metadata_for_build_wheel(metadata_directory, config_settings)
    finally:
        if build_arguments is not None:
            os.environ["MATURIN_PEP517_ARGS"] = build_arguments
    return name


prepare_metadata_for_build_editable = prepare_metadata_for_build_wheel


class UnsupportedOperation(Exception):
    """What this backend does not make."""


def build_sdist(*_: object) -> str:
    """None is made: a build needs the whole workspace, which a clone has.

    Raises:
        UnsupportedOperation: always.
    """
    message = "kvcellar has no source distribution: build a wheel from a clone of the repository"
    raise UnsupportedOperation(message)


def build_wheel(
    wheel_directory: str, config_settings: Mapping[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    """The wheel's file name, below ``wheel_directory``."""
    if os.environ.get("KVCELLAR_WITHOUT_COMMAND") != "1":
        build_command()
    try:
        name: str = maturin.build_wheel(wheel_directory, config_settings, metadata_directory)
    finally:
        # It is in the wheel now; the sources stay as they were.
        shutil.rmtree(COMMAND.parent, ignore_errors=True)
    return name


def build_editable(
    wheel_directory: str, config_settings: Mapping[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    """The same for an installation that follows the sources."""
    build_command()
    name: str = maturin.build_editable(wheel_directory, config_settings, metadata_directory)
    return name


def build_command() -> None:
    """Build the command and put it where maturin finds the package's files.

    Raises:
        RuntimeError: Cargo did not build it; it has said why on standard error.
    """
    arguments = shlex.split(os.environ.get("MATURIN_PEP517_ARGS", ""))
    chosen = _shared(arguments)
    command = ["cargo", "build", "--locked", "--package", "kvcellar-command"]
    if "--zig" in arguments:
        # As maturin does it: with a C compiler and a linker that know older systems.
        command[1] = "zigbuild"
        chosen = [_for_glibc(argument, arguments) for argument in chosen]
    command += ["--message-format", "json-render-diagnostics"]
    command += chosen if "--profile" in chosen else ["--release", *chosen]
    print(f"Running `{shlex.join(command)}`", flush=True)
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        message = f"`{shlex.join(command)}` ended with {done.returncode}"
        raise RuntimeError(message)
    (built,) = [told["executable"] for told in map(json.loads, done.stdout.splitlines()) if told.get("executable")]
    COMMAND.parent.mkdir(exist_ok=True)
    # Renamed into its place: a command that runs keeps its file.
    unfinished = COMMAND.with_name(f".{COMMAND.name}-{os.getpid()}")
    shutil.copy2(built, unfinished)
    unfinished.replace(COMMAND)


def _shared(arguments: list[str]) -> list[str]:
    """Of maturin's arguments those that count for the command, too."""
    found = []
    for at, argument in enumerate(arguments):
        name, equals, _ = argument.partition("=")
        if name in _SHARED:
            found += [argument] if equals else arguments[at : at + 2]
    return found


def _for_glibc(argument: str, arguments: list[str]) -> str:
    """A target with the version of glibc that a wheel's platform means; other arguments as they are."""
    platforms = [argument for argument in arguments if argument.startswith("manylinux_")]
    if not argument.endswith("-linux-gnu") or not platforms:
        return argument
    _, major, minor = platforms[0].split("_")[:3]
    return f"{argument}.{major}.{minor}"
