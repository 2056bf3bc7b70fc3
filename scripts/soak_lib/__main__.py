"""Runs a campaign, counts the tests that ran, and writes a report in the shape all reports of this project have."""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quickstart_lib import machine

from soak_lib.campaigns import CAMPAIGNS, PYTHON, ROOT, VENV, Campaign, Run

LOGS = ROOT / ".cache" / "soak"
# The closing lines of cargo test (`test result: ok. 3 passed; 0 failed`) and pytest
# (`2 passed, 1 skipped in 3.1s`).
PASSED = re.compile(r"\b(\d+) passed\b")
FAILED = re.compile(r"\b(\d+) (?:failed|errors?)\b")
CLOSING = re.compile(r"^test result: |^=+ .* in [0-9.]+s.* =+$")


@dataclass(frozen=True)
class Outcome:
    """Tests passed and failed, as the runners' closing lines say, and the worst exit status."""

    passed: int
    failed: int
    status: int

    @property
    def ok(self) -> bool:
        """Whether something ran and nothing failed."""
        return self.status == 0 and self.passed > 0 and self.failed == 0


def execute(run: Run, log: Path) -> Outcome:
    """Run one command; its output goes to the terminal and is added to `log`."""
    passed = failed = 0
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with (
        log.open("a", encoding="utf-8") as file,
        subprocess.Popen(
            run.command,
            cwd=ROOT,
            env={**inherited, **run.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        for line in process.stdout or ():
            file.write(line)
            print(line, end="", flush=True)
            if CLOSING.search(line):
                passed += sum(map(int, PASSED.findall(line)))
                failed += sum(map(int, FAILED.findall(line)))
    return Outcome(passed, failed, process.returncode)


def campaign_report(name: str, seeds: int, outcomes: list[Outcome], seconds: float) -> dict[str, Any]:
    """The report as plain data; `value` of the goal is the number of runs that did not end well."""
    bad = sum(not outcome.ok for outcome in outcomes)
    counts = [
        ("seeds", seeds, "seeds"),
        ("tests_passed", sum(outcome.passed for outcome in outcomes), "tests"),
        ("tests_failed", sum(outcome.failed for outcome in outcomes), "tests"),
        ("duration", round(seconds, 1), "s"),
    ]
    return {
        "commit": machine.commit(),
        "machine": machine.describe(),
        "campaign": name,
        "results": [{"name": key, "value": value, "unit": unit, "spread": 0, "n": 1} for key, value, unit in counts],
        "goals": [{"name": "runs_not_ok", "goal": 0, "value": bad, "met": bad == 0}],
    }


def enter_environment(campaign: Campaign) -> None:
    """Prepare the virtual environment and go on inside it, where the versions that the report names are.

    Raises:
        CalledProcessError: scripts/setup failed.
    """
    if Path(sys.prefix) == VENV:
        return
    subprocess.run([ROOT / "scripts" / "setup", *([] if campaign.needs_vllm else ["--no-vllm"])], check=True)
    os.execv(PYTHON, [str(PYTHON), "-m", "soak_lib", *sys.argv[1:]])


def soak(name: str, campaign: Campaign, seeds: int, folder: Path) -> int:
    """Run a campaign to its end or its first failure, and write its report."""
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / f"{name}.log"
    log.write_text("", encoding="utf-8")
    started = time.monotonic()
    outcomes: list[Outcome] = []
    for run in campaign.runs(seeds):
        print(f"soak {name}: {' '.join(f'{key}={value}' for key, value in run.environment.items())}", flush=True)
        outcomes.append(execute(run, log))
        if not outcomes[-1].ok:
            break
    report = campaign_report(name, seeds, outcomes, time.monotonic() - started)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"soak-{name}.json"
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    ok = all(outcome.ok for outcome in outcomes)
    ran = sum(outcome.passed + outcome.failed for outcome in outcomes)
    print(f"soak {name}: {'ok' if ok else 'FAILED' if ran else 'FAILED, no test ran'}; report {path}, log {log}")
    return 0 if ok else 1


def main() -> int:
    """Exit status 0 when the campaign ran and nothing failed."""
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="name the campaigns")
    run = commands.add_parser("run", help="run one campaign")
    run.add_argument("name", choices=sorted(CAMPAIGNS))
    run.add_argument("--seeds", type=_positive, help="how many seeds; without it the campaign's own number")
    run.add_argument("--report", type=Path, default=ROOT / "reports", metavar="DIR", help="folder for the report")
    arguments = parser.parse_args()
    if arguments.command == "list":
        for name, campaign in CAMPAIGNS.items():
            print(f"{name:<8} {campaign.about} ({campaign.seeds_default} seeds)")
        return 0
    campaign = CAMPAIGNS[arguments.name]
    try:
        enter_environment(campaign)
        return soak(arguments.name, campaign, arguments.seeds or campaign.seeds_default, arguments.report)
    except subprocess.CalledProcessError as error:
        print(f"soak: scripts/setup ended with status {error.returncode}; see its lines above", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsoak: interrupted, no report written", file=sys.stderr)
        return 130


def _positive(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seeds")
    return value


if __name__ == "__main__":
    sys.exit(main())
