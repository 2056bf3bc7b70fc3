"""vLLM's own CUDA path over the stub driver: no GPU, and nothing of vLLM's replaced but what needs one.

vLLM's CUDA platform, its GPU worker and both GPU model runners run with tensors in host memory and Triton's kernels in
Triton's interpreter; torch's streams and events are the stub's. So our connector's hooks, KV cache layouts, fences and
the copier are called as on a GPU, by vLLM's code, and the stub's checker compares every two accesses of the same bytes:
vLLM's slot mappings and block tables say what each step reads and writes.

Not seen here: what a GPU computes, how fast, CUDA graphs, compiled kernels, more than one rank.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.deadlines import deadline
from tests.vllm.places import temporary_pool_dir
from tests.vllm.stub_cuda import device
from tests.vllm.stub_cuda.device import MUTATIONS, OTHER_STREAM

ROOT = Path(__file__).resolve().parents[2]
# A run on a good machine takes a minute: half of it is importing vLLM, as a slow interpreter is the
# other half.
PATIENCE_S = 300.0


def run(folder: Path, pool_dir: Path, runner: int, layout: str) -> list[dict[str, Any]]:
    """What an engine of that kind told."""
    device.build(folder)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "scripts")))}
    command = [
        sys.executable,
        "-m",
        "tests.vllm.stub_cuda.engine",
        str(folder),
        str(pool_dir),
        str(runner),
        layout,
        ",".join((*MUTATIONS, OTHER_STREAM)),
    ]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=deadline(PATIENCE_S)
    )
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    assert f"Using V{runner} Model Runner" in done.stderr or runner == 1
    assert "TRITON_ATTN" in done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.e2e
@pytest.mark.parametrize(("runner", "layout"), [(1, "BLHNC"), (2, "LBNHC")])
def test_copies_keep_their_order_in_vllms_cuda_path(tmp_path: Path, runner: int, layout: str) -> None:
    with temporary_pool_dir() as pool_dir:
        told = run(tmp_path, pool_dir, runner, layout)

    answers = [one for one in told if "same" in one]
    assert len(answers) == 2
    for one in answers:
        assert one["same"], f"another answer after a hit: {one}"
        assert one["own_cached"] == one["cached"] == one["expected"] > 0, told
    counters = next(one["counters"] for one in told if "counters" in one)
    assert counters["in_service"] == 1
    assert counters["hit_blocks"] == sum(one["expected"] for one in answers) // 16
    assert counters["internal_errors"] == counters["load_failures"] == 0

    intact = next(one for one in told if one.get("mutation") == "")
    assert intact["wrongs"] == 0, intact["first"]
    # The checker had something to look at: both kinds of copies, waits between streams, a kernel's
    # accesses.
    assert min(intact["copies"], intact["waits"], intact["accesses"]) > 0

    found = {one["mutation"]: one for one in told if one.get("mutation")}
    assert set(found) == {*MUTATIONS, OTHER_STREAM}
    silent = [mutation for mutation, one in found.items() if one["wrongs"] == 0]
    assert not silent, f"the order of copies was broken, and the checker found nothing: {silent}"
    # Each by its own mark: an offload too early, and blocks given away while they are read.
    for mutation in ("CopiesWaitForNothing", OTHER_STREAM):
        assert "offload's read" in found[mutation]["first"], found[mutation]["first"]
    for mutation in ("EventsAreOverAtOnce", "ComputeWaitsForNothing"):
        assert found[mutation]["first"].startswith("a step's write"), found[mutation]["first"]
