"""The campaigns: what each one runs, and how seeds reach it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
FIRST_SEED = 1

ROUTE = "tests/vllm/test_route_soak.py"

CARGO_TEST = ("cargo", "test", "--locked", "--release")


@dataclass(frozen=True)
class Run:
    """One command of a campaign and the environment variables it adds."""

    command: tuple[str, ...]
    environment: dict[str, str]


@dataclass(frozen=True)
class Campaign:
    """A long test.

    Attributes:
        about: one line for `scripts/soak list`.
        seeds_default: seeds of a run that names none.
        needs_vllm: whether the virtual environment needs vLLM.
        runs: the commands for a number of seeds, in order.
    """

    about: str
    seeds_default: int
    needs_vllm: bool
    runs: Callable[[int], list[Run]]


def _model(seeds: int) -> list[Run]:
    environment = {"KVCELLAR_SEEDS": str(seeds), "PROPTEST_CASES": str(seeds)}
    return [Run((*CARGO_TEST, "--test", "model"), environment)]


def _slots(seeds: int) -> list[Run]:
    command = (*CARGO_TEST, "--package", "kvcellar-engine", "--features", "shuttle", "--test", "slots")
    return [Run(command, {"KVCELLAR_SEEDS": str(seeds)})]


def _torn(seeds: int) -> list[Run]:
    return [Run((*CARGO_TEST, "--test", "stores", "torn"), {"KVCELLAR_SEEDS": str(seeds)})]


def _kills(seeds: int) -> list[Run]:
    return [Run((*CARGO_TEST, "--test", "spill", "kills"), {"KVCELLAR_SEEDS": str(seeds)})]


def _fleet(seeds: int) -> list[Run]:
    # The seeds are small fleets; the large one lives long enough for millions of events.
    return [
        Run((*CARGO_TEST, "--test", "fleet", "small_fleets"), {"KVCELLAR_SEEDS": str(seeds)}),
        Run((*CARGO_TEST, "--test", "fleet", "a_fleet_of_256"), {"KVCELLAR_FLEET_STEPS": "1000"}),
    ]


def _kubernetes(seeds: int) -> list[Run]:
    # Building the server comes first, and is over at once where it is there.
    line = f'KVCELLAR_TEST_KUBE="$(scripts/kubernetes-tools server)" {PYTHON} -m pytest tests/python/test_kubernetes.py'
    return [Run(("bash", "-c", line), {})] * seeds


def _vllm(seeds: int) -> list[Run]:
    return _soaks(seeds, "tests/vllm", f"--ignore={ROUTE}")


def _route(seeds: int) -> list[Run]:
    # Its numbers go to the log.
    return _soaks(seeds, ROUTE, "-s")


def _soaks(seeds: int, *arguments: str) -> list[Run]:
    command = (str(PYTHON), "-m", "pytest", *arguments, "-m", "soak", "-o", "timeout=0")
    return [Run(command, {"KVCELLAR_TEST_SEED": str(FIRST_SEED + index)}) for index in range(seeds)]


CAMPAIGNS = {
    "model": Campaign("the engine against a plain model, random operations", 20_000, False, _model),
    "slots": Campaign("the shared slot table under explored thread schedules", 20_000, False, _slots),
    "torn": Campaign("stores damaged in every way, reopened and read", 10_000, False, _torn),
    "kills": Campaign("engines with a disk killed under load, their stores reopened", 500, False, _kills),
    "fleet": Campaign("an index of engines on bad lines against a naive one", 2_000, False, _fleet),
    "kubernetes": Campaign("router and index beside a real Kubernetes API server; needs Go", 1, False, _kubernetes),
    "route": Campaign("the router for half an hour of mixed load, fake engines coming and going", 1, True, _route),
    "vllm": Campaign("real vLLM engines, the tests marked soak, once per seed", 3, True, _vllm),
}
