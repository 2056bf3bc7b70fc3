"""The stages that start a real vLLM: each engine in a process of its own, with a limit of its own."""

import json
import os
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_check_lib import verdicts
from gpu_check_lib.cell import GIB, Cell, Phase, Scenario
from gpu_check_lib.child import run
from gpu_check_lib.plans import Plan
from gpu_check_lib.report import Report
from gpu_check_lib.table import Row, State

# Engines of the tiny model that are started beside each other: nothing of theirs is timed.
AT_A_TIME = 4
LAYOUTS = ("BLHNC", "LBNHC", "LBHNC", "BLNHC")
# Longer than an engine of the large model needs to start, by far: one that hangs does not cost the
# others.
PHASE_LIMIT_S = 90.0
SHARE_OF_SHARED_MEMORY = 0.6
LOAD_PROMPTS = 64


def cells() -> list[Cell]:
    """Every engine whose correctness is checked: backends, model runners, layouts, scheduling ahead."""
    found = [
        Cell(f"V{runner} {backend} {layout}", Scenario.CORRECT, backend=backend, runner=runner, layout=layout)
        for layout in LAYOUTS
        for backend in ("FLASH_ATTN", "TRITON_ATTN")
        for runner in (1, 2)
    ]
    return [
        *found,
        Cell("V2 FLASH_ATTN, 30 layers", Scenario.CORRECT, shape="smol", lengths=(96, 1500), kv_bytes=160 << 20),
    ]


@dataclass(frozen=True)
class Serving:
    """Where and how engines are started.

    Attributes:
        plan: how much.
        log: what engines write.
        store: on which disk the disk tier lies.
    """

    plan: Plan
    log: Path
    store: Path

    def ask(self, cell: Cell, limit_s: float) -> tuple[list[dict[str, Any]], str | None]:
        """Start a cell's engine in a process and ask it: what it told, and what went wrong."""
        with tempfile.TemporaryDirectory(prefix="kvcellar-check-", dir="/dev/shm") as pool_dir:
            cell = cell.with_(pool_dir=pool_dir)
            with self.log.open("a") as log:
                log.write(f"\n=== {cell.name}: {cell.as_json()}\n")
            ended = run(
                [sys.executable, "-m", "gpu_check_lib.serve", cell.as_json()], limit_s, cell.environment(), self.log
            )
        told = []
        for line in ended.output.splitlines():
            try:
                told.append(json.loads(line))
            except json.JSONDecodeError:
                # Of a process that was killed in the middle of it, or of somebody else.
                continue
        return told, None if ended.ok else ended.why

    def correct(self, report: Report, limit_s: float) -> None:
        """Hits of ours answer as vLLM's own do, in every cell of the plan."""
        chosen = [cell for cell in cells() if not self.plan.cells or cell.name in self.plan.cells]
        # As many turns as it takes, each with its share of the time.
        each_s = limit_s / -(-len(chosen) // AT_A_TIME)
        everything: dict[str, Any] = {}
        with ThreadPoolExecutor(AT_A_TIME) as pool:
            asked = {pool.submit(self.ask, cell, each_s): cell for cell in chosen}
            for future in as_completed(asked):
                cell, (told, why) = asked[future], future.result()
                everything[cell.name] = told
                report.add("correct", [verdicts.correct(cell, told, why)], cells=everything)

    def _timed(self, phase: Phase) -> Cell:
        return Cell(
            str(phase),
            Scenario.SPEED,
            phase=phase,
            shape="8b",
            lengths=self.plan.lengths,
            runs=self.plan.runs,
            load_prompts=LOAD_PROMPTS,
            kv_bytes=16 * GIB,
            dram_bytes=host_bytes(),
            batched_tokens=8192,
            store=str(self.store),
        )

    def speed(self, report: Report, limit_s: float) -> None:
        """Phases by turns: an engine without a connector comes first and last, so that a drift of the machine shows."""
        phases = [Phase(phase) for phase in self.plan.phases]
        if Phase.NVME in phases:
            phases.insert(phases.index(Phase.NVME), Phase.FILL)
        (self.store / "tier").mkdir(exist_ok=True)
        runs: dict[str, list[verdicts.Told]] = {}
        each_s = min(PHASE_LIMIT_S, limit_s / len(phases) * 1.3)
        for number, phase in enumerate(phases):
            cell = self._timed(phase).with_(name=f"{phase} ({number + 1} of {len(phases)})")
            told, why = self.ask(cell, each_s)
            runs.setdefault(str(phase), []).append(told)
            report.add("speed", verdicts.speed(cell, told, why), runs=runs)
        bus = verdicts.bus_rate(report.found("bus").get("bench"))
        report.add("speed", verdicts.compared(self.plan.lengths, "8b", runs, bus))

    def graphs(self, report: Report, limit_s: float) -> None:
        """CUDA graphs, then torch.compile on top: where they start, hits have to be right under them, too."""
        base = Cell("CUDA graphs", Scenario.CORRECT, shape="smol", kv_bytes=160 << 20, lengths=(96, 1500), eager=False)
        for cell in (base, base.with_(name="CUDA graphs and torch.compile", compiled=True)):
            told, why = self.ask(cell, limit_s / 2)
            started = any("start_s" in one for one in told)
            row = verdicts.correct(cell, told, why)
            if not started:
                row = Row(cell.name, f"does not start under this torch: {why}", State.SKIPPED)
            report.add("graphs", [row], **{cell.name: told})

    def soak(self, report: Report, limit_s: float) -> None:
        """Random prompts in a KV cache and a tier that are too small for them, for the time that is left."""
        # What an engine needs to start and end is not the soak's.
        seconds = limit_s - 60.0
        cell = Cell(
            f"soak of {seconds:.0f} s",
            Scenario.SOAK,
            shape="smol",
            lengths=(96, 700, 1500),
            kv_bytes=192 << 20,
            dram_bytes=192 << 20,
            crowd=24,
            seconds=seconds,
        )
        told, why = self.ask(cell, limit_s)
        report.add("soak", [verdicts.soak(cell, told, why)], told=told)


def host_bytes() -> int:
    """Host memory for a tier, the same for everybody's: what shared memory allows, at most 24 GiB."""
    free = shutil.disk_usage("/dev/shm").free
    return min(24 * GIB, int(free * SHARE_OF_SHARED_MEMORY)) >> 20 << 20


def new_store(folder: Path | None) -> Path:
    """An empty folder for the disk tier."""
    return Path(tempfile.mkdtemp(prefix="kvcellar-store-", dir=folder or os.environ.get("TMPDIR") or "/tmp"))
