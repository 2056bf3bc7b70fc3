"""The Helm chart, rendered."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from docs_lib.pages import ROOT

from tests.deadlines import deadline

yaml = pytest.importorskip("yaml")

# Where helm is not there yet, the first test builds it.
BUILD_S = 1500.0

CHART = ROOT / "docs" / "deploy" / "chart" / "kvcellar"
# Files with values, by the name of the set.
SETS = {"default": []} | {path.stem.removesuffix("-values"): [path] for path in sorted((CHART / "ci").glob("*.yaml"))}


def helm() -> str:
    """The program: the one on the path, or one that is built for it. Skips the test where there is none."""
    if found := shutil.which("helm"):
        return found
    if shutil.which("go") is None:
        pytest.skip("neither helm nor Go to build it is installed")
    build = [str(ROOT / "scripts" / "kubernetes-tools"), "helm"]
    done = subprocess.run(build, capture_output=True, text=True, check=False, timeout=deadline(BUILD_S))
    if done.returncode != 0:
        pytest.skip(f"helm cannot be built here: {done.stderr.strip().splitlines()[-1:]}")
    return str(Path(done.stdout.strip()) / "helm")


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
