"""Readings of vLLM's /metrics page."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from quickstart_lib.failure import QuickstartError

HIT_TOKENS = "vllm:kvcellar_hit_tokens_total"
SLOTS = "vllm:kvcellar_pool_slots"
SETTLE_SECONDS = 2.0
OWN_LABELS = ("tier", "state", "reason")


class Metrics:
    """Samples of one reading of the page."""

    def __init__(self, text: str) -> None:
        self._samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def total(self, name: str, **labels: str) -> float:
        """Sum of the samples called `name` that have these labels; 0 when there is none."""
        wanted = labels.items()
        return float(
            sum(sample.value for sample in self._samples if sample.name == name and wanted <= sample.labels.items())
        )

    def slots(self) -> int:
        """Blocks that the DRAM tier holds."""
        return int(self.total(SLOTS, state="total"))

    def with_prefix(self, prefix: str) -> dict[str, float]:
        """Sums of counters and gauges by name, for the report; histogram buckets are left out."""
        totals: dict[str, float] = {}
        for sample in self._samples:
            if sample.name.startswith(prefix) and not sample.name.endswith(("_bucket", "_created")):
                own = [f"{key}={sample.labels[key]}" for key in OWN_LABELS if key in sample.labels]
                key = f"{sample.name}{{{','.join(own)}}}" if own else sample.name
                totals[key] = totals.get(key, 0.0) + sample.value
        return totals

    def gpu_blocks(self) -> int:
        """Blocks of vLLM's KV cache, as the engine reports them.

        Raises:
            QuickstartError: the engine does not report it.
        """
        for sample in self._samples:
            if sample.name == "vllm:cache_config_info" and sample.labels.get("num_gpu_blocks", "None") != "None":
                return int(sample.labels["num_gpu_blocks"])
        raise QuickstartError("vLLM's metrics do not say how many KV cache blocks it has")


@dataclass(frozen=True)
class Hits:
    """Tokens by the tier that supplied them."""

    dram: int = 0
    nvme: int = 0

    def __bool__(self) -> bool:
        return self.dram + self.nvme > 0

    def __add__(self, other: "Hits") -> "Hits":
        return Hits(self.dram + other.dram, self.nvme + other.nvme)

    def __sub__(self, other: "Hits") -> "Hits":
        return Hits(self.dram - other.dram, self.nvme - other.nvme)


NO_HITS = Hits()


class HitCounter:
    """How many tokens the tiers supplied since the last look."""

    def __init__(self, read: Callable[[], str]) -> None:
        self._read = read
        self._seen = self._current()

    def tokens_since_last(self) -> Hits:
        """Growth of the hit counters since the last call. The server publishes it a moment after the answer, so
        unmoved counters are read again for up to `SETTLE_SECONDS`.
        """
        deadline = time.monotonic() + SETTLE_SECONDS
        current = self._current()
        while current == self._seen and time.monotonic() < deadline:
            time.sleep(0.05)
            current = self._current()
        grown, self._seen = current - self._seen, current
        return grown

    def mark(self) -> None:
        """Take the present value as the starting point of the next reading."""
        self._seen = self._current()

    def _current(self) -> Hits:
        page = Metrics(self._read())
        return Hits(int(page.total(HIT_TOKENS, tier="dram")), int(page.total(HIT_TOKENS, tier="nvme")))
