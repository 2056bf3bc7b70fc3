"""Facts of the machine that figures depend on: card, driver, bus, clocks, memory nodes, disk. Nothing is changed."""

import json
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from gpu_check_lib.table import Row, State

# What nvidia-smi answers in a table; names as its --help-query-gpu spells them.
_QUESTIONS = (
    "name",
    "driver_version",
    "memory.total",
    "memory.used",
    "pcie.link.gen.current",
    "pcie.link.gen.max",
    "pcie.link.width.current",
    "pcie.link.width.max",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.limit",
    "temperature.gpu",
    "persistence_mode",
    "ecc.mode.current",
    "mig.mode.current",
    "pci.bus_id",
    "compute_mode",
)
_LIMIT_S = 8.0


def _said(*command: str) -> str | None:
    """What a program prints; none where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_LIMIT_S)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _text(path: str | Path) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def gpu() -> dict[str, str] | None:
    """What nvidia-smi says of the first GPU."""
    said = _said("nvidia-smi", f"--query-gpu={','.join(_QUESTIONS)}", "--format=csv,noheader", "--id=0")
    if said is None:
        return None
    return dict(zip(_QUESTIONS, (value.strip() for value in said.splitlines()[0].split(",")), strict=False))


def _near_node(bus_id: str | None) -> str | None:
    if bus_id is None:
        return None
    # nvidia-smi writes a domain of eight digits, the kernel one of four.
    return _text(Path("/sys/bus/pci/devices") / bus_id.lower()[-12:] / "numa_node")


def disk(folder: Path) -> dict[str, Any]:
    """What `folder` lies on. A file system in memory is no disk, whatever is measured there."""
    device = folder.stat().st_dev
    queue = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    # A partition has no queue of its own.
    queue = queue / "queue" if (queue / "queue").is_dir() else queue / ".." / "queue"
    kind = _said("stat", "-f", "-c", "%T", str(folder))
    return {
        "file_system": kind,
        "device": f"{os.major(device)}:{os.minor(device)}",
        "rotational": _text(queue / "rotational"),
        "scheduler": _text(queue / "scheduler"),
        "free_gib": round(shutil.disk_usage(folder).free / 2**30, 1),
        "in_memory": kind in {"tmpfs", "ramfs"},
    }


def _memory_gib() -> float | None:
    for line in (_text("/proc/meminfo") or "").splitlines():
        if line.startswith("MemTotal:"):
            return round(int(line.split()[1]) / 2**20, 1)
    return None


def facts(store: Path) -> dict[str, Any]:
    """Everything."""
    card = gpu()
    details = _said("nvidia-smi", "-q", "-d", "CLOCK,PERFORMANCE")
    return {
        "gpu": card,
        "gpu_clocks": None if details is None else [line.strip() for line in details.splitlines() if ":" in line],
        "gpu_near_node": _near_node(None if card is None else card.get("pci.bus_id")),
        "kernel": platform.release(),
        "processors": os.cpu_count(),
        "processor": next(
            (
                line.split(":")[1].strip()
                for line in (_text("/proc/cpuinfo") or "").splitlines()
                if "model name" in line
            ),
            platform.machine(),
        ),
        "memory_gib": _memory_gib(),
        "memory_nodes": sorted(node.name for node in Path("/sys/devices/system/node").glob("node[0-9]*")),
        "shared_memory_gib": round(shutil.disk_usage("/dev/shm").total / 2**30, 1),
        "store": disk(store),
        "versions": _versions(),
    }


def _versions() -> dict[str, str | None]:
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "triton", "vllm", "kvcellar", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def rows(found: dict[str, Any]) -> list[Row]:
    """What people want to know before they look at a figure."""
    card, store = found["gpu"], found["store"]
    if card is None:
        first = [Row("GPU", "nvidia-smi finds none", State.SKIPPED)]
    else:
        link = f"generation {card['pcie.link.gen.current']} of {card['pcie.link.gen.max']}"
        lanes = card["pcie.link.width.current"]
        first = [
            Row("GPU", f"{card['name']}, driver {card['driver_version']}, {card['memory.total']}", State.OK),
            Row("PCIe link", f"{link}, {lanes} lanes, near node {found['gpu_near_node']}", State.OK),
            Row(
                "clocks", f"SM {card['clocks.sm']}, memory {card['clocks.mem']}, {card['temperature.gpu']} C", State.OK
            ),
        ]
    where = (
        "in memory: no figure of it is a disk's" if store["in_memory"] else f"{store['file_system']}, {store['device']}"
    )
    return [
        *first,
        Row(
            "host",
            f"{found['processors']} x {found['processor']}, {found['memory_gib']} GiB, {found['kernel']}",
            State.OK,
        ),
        Row(
            "memory nodes", f"{len(found['memory_nodes'])}, {found['shared_memory_gib']} GiB of shared memory", State.OK
        ),
        Row("store", f"{where}, {store['free_gib']} GiB free", State.OK),
        Row("versions", json.dumps(found["versions"]), State.OK),
    ]
