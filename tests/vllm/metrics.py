"""One reading of vLLM's metrics, from `LLM.get_metrics()` or from the text of /metrics."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sample:
    """One number with its labels, under the name it has on /metrics."""

    name: str
    labels: dict[str, str]
    value: float


class Snapshot:
    """All metrics at one moment."""

    def __init__(self, samples: Iterable[Sample], families: Iterable[str]) -> None:
        """Keeps the samples, and the names of families that may have none yet."""
        self._samples = list(samples)
        self.families = frozenset(families)

    @classmethod
    def of_engine(cls, metrics: Iterable[Any]) -> "Snapshot":
        """From `LLM.get_metrics()`, which leaves the endings of names off."""
        samples: list[Sample] = []
        families = set()
        for metric in metrics:
            families.add(metric.name)
            if hasattr(metric, "buckets"):
                samples.append(Sample(metric.name + "_count", metric.labels, metric.count))
                samples.append(Sample(metric.name + "_sum", metric.labels, metric.sum))
            elif type(metric).__name__ == "Counter":
                samples.append(Sample(metric.name + "_total", metric.labels, metric.value))
            elif type(metric).__name__ == "Gauge":
                samples.append(Sample(metric.name, metric.labels, metric.value))
        return cls(samples, families)

    @classmethod
    def of_text(cls, text: str) -> "Snapshot":
        """From the body of /metrics."""
        from prometheus_client.parser import text_string_to_metric_families

        samples: list[Sample] = []
        families = set()
        for family in text_string_to_metric_families(text):
            families.add(family.name)
            samples.extend(Sample(sample.name, dict(sample.labels), sample.value) for sample in family.samples)
        return cls(samples, families)

    def value(self, name: str, **labels: str) -> float:
        """Sum over all samples of this name that carry these labels; 0 where there is none yet."""
        wanted = labels.items()
        return sum(sample.value for sample in self._samples if sample.name == name and wanted <= sample.labels.items())

    def cellar(self, name: str, **labels: str) -> float:
        """A number of ours, without the common start of the name."""
        return self.value(f"vllm:kvcellar_{name}", **labels)

    def labels(self, name: str, label: str) -> set[str]:
        """The values that a label has over all samples of this name."""
        return {sample.labels[label] for sample in self._samples if sample.name == name and label in sample.labels}

    @property
    def hit_tokens(self) -> int:
        """Tokens loaded from dram instead of computed."""
        return int(self.cellar("hit_tokens_total", tier="dram"))

    @property
    def local_hit_tokens(self) -> int:
        """Tokens found in vLLM's own cache."""
        return int(self.value("vllm:prefix_cache_hits_total"))

    def slots(self, state: str) -> int:
        """Slots of the pool in one state: total, free, filling or filled."""
        return int(self.cellar("pool_slots", state=state))

    def leftovers(self) -> dict[str, float]:
        """What must be nothing once all requests are done and all copies have ended."""
        held = {name: self.cellar(name) for name in ("pins", "leases", "fences")}
        held["filling"] = self.slots("filling")
        held["lost slots"] = self.slots("total") - self.slots("free") - self.slots("filled")
        return {name: count for name, count in held.items() if count}
