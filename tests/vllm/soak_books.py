"""The books of a soak: what clients saw against what the router counted, so that every failure has a reason.

The router counts a decision for every request that it passed on, and one end for each of them; a refusal for every
other one. Counts by engine go with their engine, so those of the router as a whole are asked for. Clients that went
away do not know which it was, nor how far it came: they are the only leeway, and no more than their number.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tests.vllm.metrics import Snapshot
from tests.vllm.soak_client import End, Record

REASONS = ("bad_request", "model_not_found", "too_large", "shed", "no_engine")
# Refusals after a decision, and the outcome that they are.
LATE = {"upstream": "failed", "timeout": "timeout"}


@dataclass
class Books:
    """All records of one soak."""

    records: list[Record] = field(default_factory=list)

    def table(self) -> dict[str, int]:
        """How many requests ended how, for people."""
        return dict(sorted(Counter(record.label for record in self.records).items()))

    def longest(self) -> dict[str, float]:
        """Seconds of the longest request of every way in, slow readers aside, who wait as long as they like."""
        quick = [record for record in self.records if record.kind != "slow-reader"]
        taken = {front: [it.seconds for it in quick if it.front == front] for front in ("proxy", "envoy")}
        return {front: round(max(seconds, default=0.0), 1) for front, seconds in taken.items()}

    def problems(self, counted: Snapshot, seen: Iterable[Path]) -> list[str]:
        """Everything that does not add up."""
        sightings = read(seen)
        found = [f"{record}" for record in self.records if record.end in {End.STUCK, End.WRONG}]
        found += [f"{record}: no reason" for record in self.records if not is_explained(record, sightings)]
        found += self._places(sightings)
        return found + self._refusals(counted) + self._outcomes(counted, sightings)

    def _places(self, sightings: dict[int, set[str]]) -> list[str]:
        """Requests were where the router says, and nowhere if it refused them."""
        found = []
        for record in self.records:
            places = sightings.get(record.number, set())
            if record.refusal in REASONS and places:
                found.append(f"{record}: refused, yet {places} saw it")
            if record.engine and record.engine not in places:
                found.append(f"{record}: {record.engine} did not see it")
            if record.engine and record.chosen and record.engine != record.chosen:
                found.append(f"{record}: chosen was {record.chosen}")
        decisions = Counter(record.decision for record in self.records if record.decision is not None)
        return found + [f"decision {number} was made {count} times" for number, count in decisions.items() if count > 1]

    def _refusals(self, counted: Snapshot) -> list[str]:
        found = []
        for reason in REASONS:
            sure = sum(record.refusal == reason for record in self.records)
            # A body that stops in the middle is a bad request, which nobody is left to hear.
            uploads = sum(record.kind == "leave-upload" and record.end is End.LEFT for record in self.records)
            most = sure + (uploads if reason == "bad_request" else 0)
            found += between(f"refused, {reason}", refused(counted, reason), sure, most)
        return found

    def _outcomes(self, counted: Snapshot, sightings: dict[int, set[str]]) -> list[str]:
        decided = [record for record in self.records if is_decided(record, sightings)]
        left = sum(record.end is End.LEFT for record in self.records)
        unsure = left - sum(record.end is End.LEFT for record in decided)
        decisions = counted.value("kvcellar_route_decide_seconds_count")
        found = between("decisions", decisions, len(decided), len(decided) + unsure)
        total = counted.value("kvcellar_route_requests_total")
        if total != decisions:
            found.append(f"{decisions:.0f} decisions have {total:.0f} outcomes")
        sure = Counter(outcome_of(record) for record in decided)
        counts = {name: outcomes(counted, name) for name in ("done", "engine_error", "failed")}
        counts["cut"] = outcomes(counted, "broken") + outcomes(counted, "timeout")
        counts["aborted"] = outcomes(counted, "aborted")
        for name, count in counts.items():
            found += between(name, count, sure[name], sure[name] + left)
        known = sum(sure[name] for name in counts)
        return found + between("all outcomes", sum(counts.values()), known, known + left)


def read(seen: Iterable[Path]) -> dict[int, set[str]]:
    """Which engines saw which request."""
    places: dict[int, set[str]] = {}
    for path in seen:
        for line in path.read_text().splitlines() if path.exists() else []:
            row = json.loads(line)
            places.setdefault(int(row["id"]), set()).add(row["engine"])
    return places


def between(what: str, count: float, least: int, most: int) -> list[str]:
    """A complaint, unless the count lies within."""
    expected = f"{least}" if least == most else f"{least} to {most}"
    return [] if least <= count <= most else [f"{what}: {count:.0f} counted, {expected} expected"]


def refused(counted: Snapshot, reason: str) -> float:
    """Refusals for a reason."""
    return counted.value("kvcellar_route_refused_total", reason=reason)


def outcomes(counted: Snapshot, outcome: str) -> float:
    """Ends of one kind."""
    return counted.value("kvcellar_route_requests_total", outcome=outcome)


def is_decided(record: Record, sightings: dict[int, set[str]]) -> bool:
    """The router must have chosen an engine for it."""
    return record.decision is not None or record.refusal in LATE or record.number in sightings


def outcome_of(record: Record) -> str:
    """What the router must have counted; `unsure` where the client left."""
    if record.end is End.LEFT:
        return "unsure"
    if record.refusal in LATE:
        return "failed" if record.refusal == "upstream" else "cut"
    if record.end is End.BROKEN or (record.refusal == "gateway" and record.decision is None):
        # Of an answer that breaks off behind Envoy the picker hears nothing but its end.
        return "cut" if record.front == "proxy" else "aborted"
    return "engine_error" if record.status is not None and record.status >= 500 else "done"


def is_explained(record: Record, sightings: dict[int, set[str]]) -> bool:
    """The end that a request came to is one that its router or its engine had a reason for."""
    if record.end is End.BROKEN:
        return record.decision is not None
    if record.end is End.LEFT or record.engine or record.refusal in {*REASONS, *LATE}:
        return True
    # Envoy's own answer where the chosen engine could not be reached, or broke off before its head
    # was passed on.
    unreached = record.front == "envoy" and record.refusal == "gateway" and is_decided(record, sightings)
    return unreached or (record.kind == "models" and record.status == 200)
