"""The native module's way to a GPU, over the stub of the driver that `tests/cuda` builds too."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from tests.deadlines import deadline

STUB = Path(__file__).parents[1] / "cuda" / "stub"


def test_a_blocks_whole_way_over_the_stub(tmp_path: Path) -> None:
    library = tmp_path / "libcuda.so"
    flags = ["-std=c11", "-D_GNU_SOURCE", "-O1", "-shared", "-fPIC", "-pthread", "-Wl,-soname,libcuda.so,-Bsymbolic"]
    subprocess.run(["cc", *flags, *map(str, sorted(STUB.glob("*.c"))), "-o", str(library)], check=True)
    command = [sys.executable, str(Path(__file__).with_name("gpu_way.py")), str(library), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=deadline(120.0))
    assert done.returncode == 0, done.stdout + done.stderr
    # What people read in the log: how copies are dispatched, and that the pool is pinned.
    assert "copies by the engines go" in done.stdout
    assert "pinned" in done.stdout
    # Calibration tried the kernel, compiled by the NVRTC that torch brings; without torch it says
    # that there is none.
    has_torch = find_spec("torch") is not None
    assert ("no kernel" not in done.stdout) == has_torch, done.stdout
    kernels = re.search(r"(\d+) kernels", done.stdout)
    assert kernels is not None
    assert (int(kernels[1]) > 0) == has_torch
