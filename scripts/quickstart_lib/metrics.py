"""Readings of vLLM's /metrics page."""

import time
from collections.abc import Callable

from prometheus_client.parser import text_string_to_metric_families

from quickstart_lib.failure import QuickstartError

HIT_TOKENS = "vllm:kvcellar_hit_tokens_total"
SETTLE_SECONDS = 2.0
OWN_LABELS = ("tier", "state", "reason")


class Metrics:
    """Samples of one reading of the page."""

    def __init__(self, text: str) -> None:
        self._samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def total(self, name: str) -> float | None:
        """Sum of the samples called `name` over their labels; None when there is none."""
        values = [sample.value for sample in self._samples if sample.name == name]
        return sum(values) if values else None

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


class HitCounter:
    """How many tokens the DRAM tier supplied since the last look."""

    def __init__(self, read: Callable[[], str]) -> None:
        self._read = read
        self._seen = self._current()

    def tokens_since_last(self) -> int:
        """Growth of the hit counter since the last call. The server publishes it a moment after the answer, so an
        unmoved counter is read again for up to `SETTLE_SECONDS`.
        """
        deadline = time.monotonic() + SETTLE_SECONDS
        current = self._current()
        while current == self._seen and time.monotonic() < deadline:
            time.sleep(0.05)
            current = self._current()
        grown, self._seen = current - self._seen, current
        return int(grown)

    def mark(self) -> None:
        """Take the present value as the starting point of the next reading."""
        self._seen = self._current()

    def _current(self) -> float:
        return Metrics(self._read()).total(HIT_TOKENS) or 0.0
