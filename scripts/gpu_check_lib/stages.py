"""The stages that need no vLLM, and which of all stages can run here."""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_check_lib import machine, verdicts
from gpu_check_lib.child import Ended, run
from gpu_check_lib.plans import Plan
from gpu_check_lib.report import Report
from gpu_check_lib.serving import Serving
from gpu_check_lib.table import Row, State, passed

ROOT = Path(__file__).resolve().parents[2]
TEST_LIMIT_S = 120.0
TEST_MIN_S = 3.0
# Tried where there is no GPU; `scripts/test` runs all of them over host memory.
HOST_ROUND_TRIPS = ("test_a_model_on_the_default_stream", "test_sizes_that_are_no_words")
WHAT = {
    "facts": "the machine",
    "smoke": "kernels of vLLM, and what our driver's side finds",
    "copies": "round trips over torch tensors, bit by bit",
    "bus": "copies beside one copy in one piece, and what they cost a model beside them",
    "correct": "a real vLLM: hits of ours answer as its own do",
    "speed": "a real vLLM: engines by turns",
    "graphs": "a real vLLM under CUDA graphs and torch.compile, if they start",
    "soak": "a real vLLM: random prompts in too little memory",
}
NEEDS_VLLM = frozenset({"correct", "speed", "graphs", "soak"})


@dataclass(frozen=True)
class Place:
    """Where this runs.

    Attributes:
        no_gpu: why there is none; none: there is one.
        binaries: built test binaries to run, too.
        stub: the stub of the driver's library, where there is no GPU and a C compiler.
    """

    no_gpu: str | None
    binaries: tuple[str, ...]
    stub: Path | None

    def why_not(self, stage: str) -> str | None:
        """Why a stage cannot run here at all."""
        if stage not in NEEDS_VLLM:
            return None
        if self.no_gpu is not None:
            return f"{self.no_gpu}; tests/vllm/test_cuda_path.py runs the same over the stub"
        if find_spec("vllm") is None:
            return "vLLM is not there: make the bundle (scripts/gpu-bundle) and bring it along"
        return None


def build_stub(folder: Path) -> Path | None:
    """The stub of the driver's library; none without a C compiler."""
    sources = sorted((ROOT / "tests" / "cuda" / "stub").glob("*.c"))
    library = folder / "libcuda.so"
    flags = ["-std=c11", "-D_GNU_SOURCE", "-O1", "-shared", "-fPIC", "-pthread", "-Wl,-soname,libcuda.so,-Bsymbolic"]
    try:
        subprocess.run(["cc", *flags, *map(str, sources), "-o", str(library)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return library


def why_no_gpu() -> str | None:
    """Why nothing can run on a GPU."""
    ended = run([sys.executable, "-c", "import torch; print(torch.cuda.is_available())"], 60.0)
    if not ended.ok:
        return "no GPU: torch is not there"
    return None if ended.output.strip() == "True" else "no GPU: torch finds none"


def part(limit_s: float, *arguments: str, **environment: str) -> tuple[Ended, list[Row], list[dict[str, Any]]]:
    """Run a part: how it ended, its rows, and what else it told, also if it did not get to its end."""
    command = [sys.executable, "-m", "gpu_check_lib.part", "--limit-s", str(limit_s), *arguments]
    ended = run(command, limit_s, environment)
    told: list[dict[str, Any]] = []
    for line in ended.output.splitlines():
        try:
            told.append(json.loads(line))
        except json.JSONDecodeError:
            # Of a process that was killed in the middle of it, or of somebody else.
            continue
    rows = [Row.of(row) for one in told for row in one.pop("rows")]
    return ended, rows, told


@dataclass(frozen=True)
class Stages:
    """All stages of a run, by name. Each takes the report and how long it may take."""

    plan: Plan
    place: Place
    serving: Serving

    def run(self, stage: str, report: Report, limit_s: float) -> None:
        """One of them."""
        if stage in NEEDS_VLLM:
            getattr(self.serving, stage)(report, limit_s)
        else:
            getattr(self, f"_{stage}")(report, limit_s)

    def _facts(self, report: Report, _limit_s: float) -> None:
        found = machine.facts(self.serving.store)
        report.add("facts", machine.rows(found), **found)

    def _smoke(self, report: Report, limit_s: float) -> None:
        if self.place.no_gpu is not None:
            report.add("smoke", [Row("kernels of vLLM", self.place.no_gpu, State.SKIPPED)])
            report.add("smoke", [self._over_stub(limit_s)])
            return
        doctor = run([sys.executable, "-m", "kvcellar", "doctor"], limit_s / 2)
        report.add("smoke", [passed("kvcellar doctor", f"{doctor.seconds:.1f} s", doctor.ok)], doctor=doctor.output)
        if find_spec("vllm") is None:
            report.add("smoke", [Row("kernels of vLLM", "vLLM is not there", State.SKIPPED)])
            return
        ended = run([sys.executable, "-m", "gpu_check_lib.kernels"], limit_s / 2)
        told = [json.loads(line) for line in ended.output.splitlines() if line.startswith("{")]
        rows = [passed(one["name"], one.get("failed") or f"error {one['error']:.2e}", one["ok"]) for one in told]
        if not ended.ok:
            rows.append(Row("kernels of vLLM", ended.why, State.FAILED))
        report.add("smoke", rows, kernels=told)

    def _over_stub(self, limit_s: float) -> Row:
        """A block's whole way over the stub of the driver."""
        name = "a block's way over the stub"
        if self.place.stub is None:
            return Row(name, "no C compiler builds it", State.SKIPPED)
        program = ROOT / "tests" / "python" / "gpu_way.py"
        with tempfile.TemporaryDirectory() as pool:
            ended = run([sys.executable, str(program), str(self.place.stub), pool], limit_s)
        return Row(name, f"{ended.seconds:.1f} s", State.STUB) if ended.ok else Row(name, ended.why, State.FAILED)

    def _copies(self, report: Report, limit_s: float) -> None:
        """The round trips, one process each, and built test binaries."""
        deadline = time.monotonic() + limit_s
        # Over host memory the bytes alone are compared.
        where = {} if self.place.no_gpu is None else {"KVCELLAR_HARDWARE_DEVICE": "cpu"}
        wanted = self.plan.round_trips if self.place.no_gpu is None else HOST_ROUND_TRIPS
        listed, _, told = part(min(limit_s, TEST_LIMIT_S), "list", **where)
        names: list[str] = [name for one in told for name in one.get("names", [])]
        chosen = [name for name in names if not wanted or name.split(".")[-1] in wanted]
        if not listed.ok or not chosen:
            report.add("copies", [Row("list of round trips", listed.why, State.FAILED)])
            return
        report.add("copies", [], **{key: value for one in told for key, value in one.items() if key != "names"})
        for name in [*chosen, *self.place.binaries]:
            left_s = deadline - time.monotonic()
            if left_s < TEST_MIN_S:
                report.add("copies", [Row(Path(name).name, "no time is left for it in this stage", State.SKIPPED)])
            elif name in self.place.binaries:
                report.add("copies", [_binary(name, min(TEST_LIMIT_S, left_s))])
            else:
                ended, rows, _ = part(min(TEST_LIMIT_S, left_s), "test", name, **where)
                # It may have passed and crashed at its end.
                report.add("copies", rows if ended.ok else [Row(name, ended.why, State.FAILED)])

    def _bus(self, report: Report, limit_s: float) -> None:
        """`kvcellar bench dma`, and what copies cost a model beside them."""
        if self.place.no_gpu is not None:
            report.add(
                "bus", [self._bus_over_stub(limit_s), Row("copies beside a model", self.place.no_gpu, State.SKIPPED)]
            )
            return
        size = [f"--mib={self.plan.bus_mib}", f"--repetitions={self.plan.bus_repetitions}"]
        ended, found, problem = bench_dma(size, limit_s * 0.6)
        rows = [Row("kvcellar bench dma", problem, State.FAILED)] if found is None else verdicts.bus(found)
        report.add("bus", rows, bench=found)
        ended, rows, told = part(max(10.0, limit_s - ended.seconds), "overlap")
        if not ended.ok:
            rows.append(Row("overlap of copies and compute", ended.why, State.FAILED))
        report.add("bus", rows, overlap=[one["cost"] for one in told])

    def _bus_over_stub(self, limit_s: float) -> Row:
        """Figures of a stub are none: what is kept is that there were as many as there should be."""
        name = "kvcellar bench dma"
        if self.place.stub is None:
            return Row(name, f"{self.place.no_gpu}, and no C compiler builds the stub", State.SKIPPED)
        environment = {"LD_LIBRARY_PATH": str(self.place.stub.parent)}
        _, found, problem = bench_dma(["--mib=8", "--repetitions=1"], limit_s, environment)
        if found is None:
            return Row(name, problem, State.FAILED)
        told = f"ran over the stub: {len(found['results'])} results and {len(found['goals'])} goals, thrown away"
        return Row(name, told, State.STUB)


def bench_dma(
    size: list[str], limit_s: float, environment: dict[str, str] | None = None
) -> tuple[Ended, dict[str, Any] | None, str]:
    """`kvcellar bench dma`: how it ended, its report, and what was wrong where there is none."""
    ended = run([sys.executable, "-m", "kvcellar", "bench", "dma", "--json", *size], limit_s, environment)
    if not ended.ok:
        return ended, None, ended.why
    try:
        return ended, json.loads(ended.output), ""
    except json.JSONDecodeError as error:
        return ended, None, f"its report is no JSON: {error}"


def _binary(path: str, limit_s: float) -> Row:
    """A built test binary."""
    try:
        ended = run([path], limit_s)
    except OSError as error:
        return Row(Path(path).name, str(error), State.FAILED)
    told = next((line for line in ended.output.splitlines() if line.startswith("test result")), ended.why)
    return passed(Path(path).name, told if ended.ok else f"{told} ({ended.why})", ended.ok)
