"""The metrics that the sources declare, without running anything."""

import ast
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from docs_lib.pages import ROOT

STATS = ROOT / "python" / "kvcellar" / "stats.py"
INDEX = ROOT / "src" / "index" / "api" / "metrics.rs"
ROUTE = ROOT / "src" / "route" / "metrics.rs"


@dataclass(frozen=True)
class Metric:
    """One family.

    Attributes:
        name: as in its declaration.
        kind: `counter`, `gauge` or `histogram`.
        labels: ours, beside those that vLLM and Prometheus add.
        text: what it says.
    """

    name: str
    kind: str
    labels: tuple[str, ...]
    text: str

    @property
    def samples(self) -> tuple[str, ...]:
        """The names under which a scrape shows it."""
        endings = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}[self.kind]
        return tuple(self.name + ending for ending in endings)


def _constants(path: Path) -> dict[str, Any]:
    """The literal values that a Python file assigns to names in capitals."""
    found: dict[str, Any] = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            targets, value = [node.target], node.value
        else:
            continue
        if isinstance(targets[0], ast.Name) and targets[0].id.isupper():
            found[targets[0].id] = ast.literal_eval(value)
    return found


def _family(name: str, labels: dict[str, str]) -> str:
    """As `family_of` in stats.py, which cannot be imported without vLLM."""
    for value in labels.values():
        name = name.removeprefix(f"{value}_")
    return name


def engine() -> list[Metric]:
    """Metrics of an engine, on vLLM's own `/metrics`."""
    said = _constants(STATS)
    source = STATS.read_text()
    families: dict[str, Metric] = {}
    for name, (text, labels) in said["COUNTERS"].items():
        family = _family(name, labels)
        families.setdefault(family, Metric(f"vllm:kvcellar_{family}", "counter", tuple(labels), text))
    for name, (text, labels) in said["TENANT_COUNTERS"].items():
        family = f"tenant_{_family(name, labels)}"
        families.setdefault(family, Metric(f"vllm:kvcellar_{family}", "counter", ("tenant", *labels), text))
    dropped, text = said["DROPPED"]
    families[dropped] = Metric(f"vllm:kvcellar_{dropped}", "counter", ("reason",), text)
    others = re.findall(r'name="vllm:kvcellar_(\w+)",\s*documentation="([^"]+)"', source)
    for name, text in others:
        kind, labels = {
            "pool_slots": ("gauge", ("state",)),
            "tenant_blocks": ("gauge", ("tenant", "tier")),
        }.get(name, ("histogram", ()))
        families[name] = Metric(f"vllm:kvcellar_{name}", kind, labels, text)
    for name, text in said["GAUGES"].items():
        families[name] = Metric(f"vllm:kvcellar_{name}", "gauge", (), text)
    return list(families.values())


def _prefix(path: Path, source: str) -> str:
    """What stands before every name of a registry."""
    found = re.search(r'with_prefix\("(\w+)"\)', source)
    if found is None:
        message = f"{path} has no registry with a prefix any more"
        raise ValueError(message)
    return found[1]


def index() -> list[Metric]:
    """Metrics of `kvcellar index serve`."""
    source = INDEX.read_text()
    prefix = _prefix(INDEX, source)
    kinds = {"number": "gauge", "count": "counter"}
    found = [
        Metric(f"{prefix}_{name}", kinds[how], (), text)
        for how, name, text in re.findall(r'\b(number|count)\(&mut registry, "(\w+)", "([^"]+)"', source)
    ]
    for name, text in re.findall(r'registry\.register\("(\w+)", "([^"]+)"', source):
        kind = "histogram" if name.endswith("_seconds") else "counter" if name == "clients_cut" else "gauge"
        label = {
            "clients_cut": ("reason",),
            "source_connected": ("source",),
            "source_silence": ("source",),
            "engine_live": ("engine",),
            "engine_gaps": ("engine",),
        }
        found.append(Metric(f"{prefix}_{name}", kind, label.get(name, ()), text))
    return found


# Labels of the router's families, which the sources set where they count.
_ROUTE_LABELS = {
    "decisions": ("engine", "prefix"),
    "refused": ("reason",),
    "inexact": ("reason",),
    "outcomes": ("engine", "outcome"),
    "retries": ("engine",),
    "requests": ("outcome",),
    "aliased": ("alias", "model"),
    "sources": ("engine",),
    "prefills": ("engine", "outcome"),
    "events_connected": ("engine",),
    "events_age_seconds": ("engine",),
    "queue_requests": ("priority",),
    "peers": ("state",),
    "predictions": ("prefix", "reported"),
    "clients_cut": ("reason",),
}


def route() -> list[Metric]:
    """Metrics of `kvcellar route`."""
    source = ROUTE.read_text()
    prefix = _prefix(ROUTE, source)
    kinds = {
        "Counts": "counter",
        "Counter": "counter",
        "PerEngine": "gauge",
        "Gauge": "gauge",
        "Histogram": "histogram",
    }
    pattern = r'(add|counts)\(\s*registry,\s*"(\w+)",\s*"([^"]+)"(?:,\s*(\w+)::)?'
    return [
        Metric(
            f"{prefix}_{name}",
            "counter" if made_by == "counts" else kinds[how],
            ("engine",) if name.startswith("engine_") else _ROUTE_LABELS.get(name, ()),
            text,
        )
        for made_by, name, text, how in re.findall(pattern, source)
    ]


def everything() -> list[Metric]:
    """All metrics of engine, index and router."""
    return [*engine(), *index(), *route()]
