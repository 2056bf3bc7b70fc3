"""The Helm chart, rendered."""

import functools
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from docs_lib.pages import ROOT

from tests.deadlines import deadline

yaml = pytest.importorskip("yaml")

# Where helm is not there yet, the first test builds it, if that is done in so many seconds.
BUILD_S = 300.0

CHART = ROOT / "docs" / "deploy" / "chart" / "kvcellar"
# Files with values, by the name of the set.
SETS = {"default": []} | {path.stem.removesuffix("-values"): [path] for path in sorted((CHART / "ci").glob("*.yaml"))}


def helm() -> str:
    """The program: the one on the path, or one that is built for it. Skips the test where there is none."""
    if found := shutil.which("helm"):
        return found
    if shutil.which("go") is None:
        pytest.skip("neither helm nor Go to build it is installed")
    built = _build()
    if built is None:
        pytest.skip(f"helm is not built within {BUILD_S:.0f} s: run scripts/kubernetes-tools helm once")
    if built.returncode != 0:
        pytest.skip(f"helm cannot be built here: {built.stderr.strip().splitlines()[-1:]}")
    return str(Path(built.stdout.strip()) / "helm")


@functools.cache
def _build() -> subprocess.CompletedProcess[str] | None:
    """Builds helm; None where that takes too long. Whoever works on it ends with it."""
    command = [str(ROOT / "scripts" / "kubernetes-tools"), "helm"]
    build = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        output, errors = build.communicate(timeout=BUILD_S)
    except subprocess.TimeoutExpired:
        os.killpg(build.pid, signal.SIGKILL)
        build.communicate()
        return None
    return subprocess.CompletedProcess(command, build.returncode, output, errors)


def run(helm: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One command of helm."""
    return subprocess.run([helm, *arguments], capture_output=True, text=True, check=False, timeout=deadline(60.0))


def render(helm: str, *arguments: str) -> list[dict[str, Any]]:
    """The objects of a release."""
    done = run(helm, "template", "fleet", str(CHART), "--namespace", "llm", *arguments)
    assert done.returncode == 0, done.stderr
    return [one for one in yaml.safe_load_all(done.stdout) if one]


def refusal(helm: str, *settings: str) -> str:
    """Why values are refused."""
    done = run(helm, "template", "fleet", str(CHART), *(part for one in settings for part in ("--set", one)))
    assert done.returncode != 0, done.stdout
    return done.stderr


def files(name: str) -> list[str]:
    """Arguments that name a set of values."""
    return [part for path in SETS[name] for part in ("--values", str(path))]
