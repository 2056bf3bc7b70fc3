"""What our connector costs EngineCore when nothing is ever reused.

Measured: CPU time of EngineCore's scheduler thread inside our calls, per step and per offloaded block; CPU time of the
whole EngineCore process per step, with and without us, in interleaved rounds; and the first as a share of the second.
Not measured: the workers' copies, and time to first token. Both engines stay up all the time; one is always idle.

    python -m tests.vllm.overhead --json
"""

import argparse
import contextlib
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.vllm.engines import Engine, open_engine
from tests.vllm.places import ROOT, temporary_pool_dir
from tests.vllm.processes import engine_cores
from tests.vllm.prompts import Conversation
from tests.vllm.server import BLOCK_TOKENS
from tests.vllm.sizes import kv_mib
from tests.vllm.sums import FILE_VARIABLE, Sums, clock_cost_ns

GOAL_SHARE = 0.01
LANES = 4
PROMPT_TOKENS = 300
TIMED = {"kv_connector": "TimedConnector", "kv_connector_module_path": "tests.vllm.timed"}


@dataclass(frozen=True)
class Result:
    """One number. `spread` is the difference between the largest and the smallest of `n` rounds."""

    name: str
    value: float
    unit: str
    spread: float
    n: int

    @classmethod
    def of(cls, name: str, values: Sequence[float], unit: str) -> "Result":
        """The median of some rounds."""
        return cls(name, statistics.median(values), unit, max(values) - min(values), len(values))


@dataclass(frozen=True)
class Subject:
    """An engine under measurement. Without us there is no file of sums."""

    engine: Engine
    core: psutil.Process
    sums: Path | None

    def cpu_s(self) -> float:
        """CPU time of EngineCore so far, all threads."""
        times = self.core.cpu_times()
        return float(times.user + times.system)


@dataclass
class Rounds:
    """Measurements, one element a round."""

    with_us: list[float] = field(default_factory=list)
    step_us: list[float] = field(default_factory=list)
    block_us: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    without_us: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Workload:
    """How much one round asks: `batches` times four new prompts at once."""

    rounds: int
    batches: int
    answer_tokens: int

    def run(self, engine: Engine, rng: random.Random) -> None:
        """One round in which no prompt shares a block with any other."""
        limit = PROMPT_TOKENS + self.answer_tokens
        for _ in range(self.batches):
            turn = (PROMPT_TOKENS, PROMPT_TOKENS)
            engine.converse(
                [Conversation(random.Random(rng.random()), turn, limit) for _ in range(LANES)], self.answer_tokens
            )

    @property
    def blocks(self) -> int:
        """Full blocks of one round."""
        return self.batches * LANES * ((PROMPT_TOKENS + self.answer_tokens - 1) // BLOCK_TOKENS)


def measure(subject: Subject, workload: Workload, rounds: Rounds, rng: random.Random) -> None:
    """One round of one engine."""
    before = Sums.read(subject.sums) if subject.sums else None
    cpu_s, steps = subject.cpu_s(), subject.engine.steps
    workload.run(subject.engine, rng)
    step_us = (subject.cpu_s() - cpu_s) / (subject.engine.steps - steps) * 1e6
    if before is None or subject.sums is None:
        rounds.without_us.append(step_us)
        return
    spent = Sums.read(subject.sums).since(before)
    connector_us = (spent.connector_ns - spent.calls * clock_cost_ns()) / 1e3
    rounds.with_us.append(step_us)
    rounds.step_us.append(connector_us / spent.steps)
    rounds.block_us.append(connector_us / workload.blocks)
    rounds.shares.append(connector_us * 1e3 / spent.process_ns)


@contextlib.contextmanager
def started(work_dir: Path, name: str, cellar: Mapping[str, object] | None) -> Iterator[Subject]:
    """An engine, with our timed connector when there is a configuration for it."""
    sums = work_dir / f"{name}.sums" if cellar is not None else None
    env = {FILE_VARIABLE: str(sums)} if sums else {}
    before = engine_cores(os.getpid())
    with (
        temporary_pool_dir() as pool_dir,
        open_engine(
            work_dir, pool_dir, cellar=cellar, transfer=TIMED, env=env, name=name, max_num_batched_tokens=1024
        ) as engine,
    ):
        (core,) = engine_cores(os.getpid()) - before
        yield Subject(engine, core, sums)


def compare(workload: Workload, seed: int) -> Rounds:
    """Interleaved rounds, each engine first in half of them."""
    rng, rounds = random.Random(seed), Rounds()
    # No operation log: writing it would be measured too.
    cellar = {"dram_size": kv_mib(512), "namespace_salt": "overhead", "trace_file": None}
    with (
        tempfile.TemporaryDirectory() as work_dir,
        started(Path(work_dir), "with", cellar) as ours,
        started(Path(work_dir), "without", None) as theirs,
    ):
        for subject in (ours, theirs):
            Workload(1, 1, workload.answer_tokens).run(subject.engine, rng)
        for number in range(workload.rounds):
            for subject in (ours, theirs) if number % 2 == 0 else (theirs, ours):
                measure(subject, workload, rounds, rng)
    return rounds


def machine() -> dict[str, Any]:
    """Where this ran."""
    import vllm

    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "vllm": vllm.__version__,
    }


def commit() -> str | None:
    """What was measured."""
    asked = ["git", "rev-parse", "HEAD"]
    return subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip() or None


def report(rounds: Rounds) -> dict[str, Any]:
    """The common shape of all our benches."""
    results = [
        Result.of("connector_step_cpu", rounds.step_us, "us"),
        Result.of("connector_block_cpu", rounds.block_us, "us"),
        Result.of("enginecore_step_cpu_with", rounds.with_us, "us"),
        Result.of("enginecore_step_cpu_without", rounds.without_us, "us"),
        Result.of("connector_share_of_step_cpu", rounds.shares, "ratio"),
    ]
    share = results[-1].value
    goal = {
        "name": "connector_share_of_step_cpu",
        "goal": f"at most {GOAL_SHARE}",
        "value": share,
        "met": share <= GOAL_SHARE,
    }
    return {
        "commit": commit(),
        "machine": machine(),
        "results": [asdict(result) for result in results],
        "goals": [goal],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the bench and prints its report; ends 0 whether or not the goal is met."""
    parser = argparse.ArgumentParser(prog="python -m tests.vllm.overhead", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--batches", type=int, default=3, help="batches of four prompts in one round")
    parser.add_argument("--answer-tokens", type=int, default=32)
    parser.add_argument("--seed", type=int, default=20817)
    chosen = parser.parse_args(arguments)
    print(f"two engines, {chosen.rounds} rounds each; seed {chosen.seed}", file=sys.stderr)
    made = report(compare(Workload(chosen.rounds, chosen.batches, chosen.answer_tokens), chosen.seed))
    if chosen.json:
        print(json.dumps(made))
        return 0
    for result in made["results"]:
        shown = f"{result['name']:32} {result['value']:12.4f} {result['unit']:5}"
        print(f"{shown} spread {result['spread']:.4f}, {result['n']} rounds")
    for goal in made["goals"]:
        print(f"goal {goal['name']}: {goal['goal']}: {'met' if goal['met'] else 'NOT met'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
