"""What the native parts counted, on its way to vLLM's ``/metrics``."""

from collections.abc import Mapping
from typing import Any, Self

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
    PromMetric,
    PromMetricT,
)
from vllm.logger import init_logger

from kvcellar._native import CopyReport, EngineStats

logger = init_logger(f"vllm.{__name__}")

# name -> (description, fixed labels). Names get `vllm:kvcellar_` in front and `_total` behind. A
# family has one entry for each value of its label, whose name begins with the value; the first may
# do without.
COUNTERS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "hit_blocks": ("Blocks loaded for requests.", {"tier": "dram"}),
    "hit_tokens": ("Tokens loaded for requests.", {"tier": "dram"}),
    "miss_blocks": ("Blocks of admitted requests found neither in vLLM's own cache nor here.", {}),
    "miss_tokens": ("Tokens of admitted requests found neither in vLLM's own cache nor here.", {}),
    "stored_blocks": ("Blocks that became available.", {"tier": "dram"}),
    "evicted_blocks": ("Blocks evicted for others.", {"tier": "dram"}),
    "adopted_blocks": ("Blocks taken over from an earlier engine.", {"tier": "dram"}),
    "load_failures": ("Loads that failed and were computed instead.", {}),
    "shared_load_waits": ("Lookups asked to wait for another request's load of the same prefix.", {}),
    "nvme_hit_blocks": ("Blocks loaded for requests.", {"tier": "nvme"}),
    "nvme_hit_tokens": ("Tokens loaded for requests.", {"tier": "nvme"}),
    "spilled_blocks": ("Blocks written to disk.", {}),
    "spilled_bytes": ("Bytes written to disk, descriptors included.", {}),
    "restored_blocks": ("Blocks that came from disk into a slot of the dram tier.", {}),
    "restored_bytes": ("Bytes read from disk for restores, descriptors included.", {}),
    "nvme_evicted_blocks": ("Blocks evicted for others.", {"tier": "nvme"}),
    "nvme_reopened_blocks": ("Blocks found on disk at start.", {}),
    "disk_errors": ("Transfers that the disk refused or cut short, or that took too long.", {}),
    "corrupt_extents": ("Extents whose bytes did not match their checksums.", {}),
    "nvme_outages": ("Times the nvme tier went out of service.", {}),
    "load_decisions": ("Admitted requests whose part on disk was loaded.", {}),
    "recompute_decisions": ("Admitted requests whose part on disk was computed instead (load_policy).", {}),
    "followed_loads": ("Loads with blocks from disk, over all ranks.", {}),
    "overlapped_loads": ("Those whose first copy began before their last read had ended, over all ranks.", {}),
    "undescribed_blocks": ("Blocks whose descriptor did not fit: served, but never adopted.", {}),
    "offload_bytes": ("Bytes copied from the KV cache to the pool, over all ranks.", {}),
    "load_bytes": ("Bytes copied from the pool to the KV cache, over all ranks.", {}),
    "offload_seconds": ("Seconds with an offload under way, over all ranks.", {}),
    "load_seconds": ("Seconds with a load under way, over all ranks.", {}),
    "verified_loads": ("Loaded blocks whose bytes were compared (verify_loads), over all ranks.", {}),
    "mismatched_loads": ("Loaded blocks whose bytes did not match their checksum, over all ranks.", {}),
    "pins_refused": ("Blocks that a request wanted pinned, beyond what may be.", {}),
    "internal_errors": ("Errors of KV Cellar itself: after one the tiers are out of service until the next start.", {}),
    "invariant_violations": ("States that cannot be, found and survived: bugs of KV Cellar.", {}),
    "saved_seconds": ("Seconds of prefill that loaded tokens would have taken.", {"tier": "dram"}),
    "nvme_saved_seconds": ("Seconds of prefill that loaded tokens would have taken.", {"tier": "nvme"}),
    "what_if_blocks": ("Blocks that the live what-if looked up: vLLM's own cache did not have them.", {}),
    "now_what_if_misses": ("Those that a cache of this capacity would miss (an estimate).", {"capacity": "now"}),
    "double_what_if_misses": ("Those that a cache of twice the capacity would miss.", {"capacity": "double"}),
    "infinite_what_if_misses": ("Those that a cache without end would miss.", {"capacity": "infinite"}),
    "left_out_requests": ("Requests served without KV Cellar, because a value of theirs cannot be used.", {}),
}
DROPPED = ("dropped_blocks", "Blocks that were not kept, by reason.")
DROP_REASONS = (
    "no_slot",
    "own_prefix",
    "queue_full",
    "copy_failed",
    "corrupt",
    "reset",
    "unspilled",
    "disk_failed",
    "expired",
    "overwritten",
    "forgotten",
)
# As COUNTERS, for each tenant, with `tenant_` before the family; "other" stands for all requests of
# none.
TENANT_COUNTERS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "hit_tokens": ("Tokens loaded for a tenant's requests.", {"tier": "dram"}),
    "nvme_hit_tokens": ("Tokens loaded for a tenant's requests.", {"tier": "nvme"}),
    "miss_tokens": ("Tokens of a tenant's requests found neither in vLLM's own cache nor here.", {}),
    "evicted_blocks": ("A tenant's blocks evicted from the dram tier.", {}),
}
SLOT_STATES = ("total", "free", "filling", "filled", "clean")
GAUGES: Mapping[str, str] = {
    "in_service": "1 while blocks are stored and loaded; 0 before the pool is there and after an internal error.",
    "pins": "Holds on blocks.",
    "pinned_blocks": "Blocks that requests have pinned for a time.",
    "leases": "Running loads.",
    "fences": "vLLM blocks that wait to be copied before they may be overwritten.",
    "pending_events": "KVEvents that wait for a step.",
    "pool_bytes": "Bytes of the host pool.",
    "pool_huge_bytes": "Bytes of the host pool that lie in huge pages.",
    "nvme_blocks": "Blocks on disk.",
    "nvme_extents": "Extents that exist on disk, used or not.",
    "nvme_writing": "Blocks being written to disk.",
    "nvme_reading": "Blocks being read from disk.",
    "nvme_retired": "Extents that failed, or wait to be erased, and hold no blocks meanwhile.",
    "nvme_in_service": "1 while the nvme tier is in service.",
    "nvme_io_uring": "1 with io_uring, 0 with threads.",
    "nvme_direct": "1 with O_DIRECT, 0 with buffered I/O.",
    "nvme_registered": "1 with the pool registered with the kernel.",
    "nvme_staging_bytes": "Bytes in huge pages that transfers pass through; 0 where they go directly.",
    "nvme_write_budget_left_bytes": "Bytes that nvme_write_budget allows to be written at this moment; 0 without one.",
}
LOOKUP_BUCKETS = (1e-6, 2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 1e-1)


def family_of(name: str, labels: Mapping[str, str]) -> str:
    """One family for all values of a label: they are no part of its name."""
    for value in labels.values():
        name = name.removeprefix(f"{value}_")
    return name


class KVCellarStats(KVConnectorStats):
    """Growth of counters since the last report, and the present value of gauges.

    ``data``: ``counters`` (name -> amount), ``dropped`` (reason -> blocks), ``gauges`` (name -> value),
    ``lookup_seconds`` (list of seconds), ``tenants`` (name -> counters, and blocks by tier; only where there are
    tenants). All of it crosses process borders, so it is plain data.
    """

    data: dict[str, Any]

    def reset(self) -> None:
        """Forget everything."""
        self.data = {}

    def is_empty(self) -> bool:
        """Nothing was counted and no gauge moved."""
        return not any(self.data.values())

    def aggregate(self, other: KVConnectorStats) -> Self:
        """Add another report, of another rank or of a later interval."""
        for part in ("counters", "dropped"):
            mine = self.data.setdefault(part, {})
            for name, amount in other.data.get(part, {}).items():
                mine[name] = mine.get(name, 0) + amount
        self.data.setdefault("gauges", {}).update(other.data.get("gauges", {}))
        self.data.setdefault("lookup_seconds", []).extend(other.data.get("lookup_seconds", []))
        tenants = self.data.setdefault("tenants", {})
        for tenant, (grown, blocks) in other.data.get("tenants", {}).items():
            counters, before = tenants.get(tenant, ({}, {}))
            summed = {name: counters.get(name, 0) + grown.get(name, 0) for name in {**counters, **grown}}
            tenants[tenant] = (summed, {**before, **blocks})
        return self

    def reduce(self) -> dict[str, int | float]:
        """The interval in one line of vLLM's log."""
        counters = self.data.get("counters", {})
        gauges = self.data.get("gauges", {})
        line: dict[str, int | float] = {f"kvcellar {name}": round(value, 4) for name, value in counters.items()}
        for name in ("filled_slots", "total_slots"):
            if name in gauges:
                line[f"kvcellar {name}"] = gauges[name]
        return line


def with_engine(own: KVCellarStats, stats: EngineStats) -> KVCellarStats:
    """The report of the scheduler's side (see `of_side`), with that of its tier engine, which counts other things."""
    counters, gauges = stats.counters, stats.gauges
    counters.update(own.data["counters"])
    gauges.update(own.data["gauges"])
    return KVCellarStats(
        data={
            "counters": counters,
            "dropped": stats.dropped,
            "gauges": gauges,
            "lookup_seconds": stats.lookup_seconds,
            "tenants": stats.tenants,
        }
    )


def of_worker(report: CopyReport) -> KVCellarStats:
    """A copy worker's report."""
    counters = {
        "offload_bytes": report.offload_bytes,
        "load_bytes": report.load_bytes,
        "offload_seconds": report.offload_seconds,
        "load_seconds": report.load_seconds,
        "verified_loads": report.verified_blocks,
        "mismatched_loads": report.mismatched_blocks,
        "followed_loads": report.followed_loads,
        "overlapped_loads": report.overlapped_loads,
    }
    return KVCellarStats(data={"counters": {name: value for name, value in counters.items() if value}})


def of_side(errors: int, left_out: int, *, in_service: bool | None = None) -> KVCellarStats:
    """What one side of the connector counts itself; ``in_service`` is the scheduler's to say."""
    counted = {"internal_errors": errors, "left_out_requests": left_out}
    counters = {name: value for name, value in counted.items() if value}
    gauges = {} if in_service is None else {"in_service": int(in_service)}
    return KVCellarStats(data={"counters": counters, "gauges": gauges})


def without_tiers(own: KVCellarStats) -> KVCellarStats:
    """The report of a side whose tiers are out of service: nothing is held, whatever the native engine would say."""
    names = [*GAUGES, *(f"{state}_slots" for state in SLOT_STATES)]
    own.data["gauges"] = dict.fromkeys(names, 0)
    return own


class KVCellarPromMetrics(KVConnectorPromMetrics):
    """Our metrics in vLLM's Prometheus registry, with vLLM's labels in front of ours."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[type[PromMetric], type[PromMetricT]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        engines = per_engine_labelvalues.items()
        self._counters: dict[tuple[int, str], Any] = {}
        families: dict[str, Any] = {}
        for name, (text, labels) in COUNTERS.items():
            family = family_of(name, labels)
            counter = families.get(family)
            if counter is None:
                counter = families[family] = self._counter_cls(
                    name=f"vllm:kvcellar_{family}", documentation=text, labelnames=[*labelnames, *labels]
                )
            for engine, values in engines:
                self._counters[engine, name] = counter.labels(*values, *labels.values())
        dropped = self._counter_cls(
            name=f"vllm:kvcellar_{DROPPED[0]}", documentation=DROPPED[1], labelnames=[*labelnames, "reason"]
        )
        self._dropped = {
            (engine, reason): dropped.labels(*values, reason) for engine, values in engines for reason in DROP_REASONS
        }
        slots = self._gauge_cls(
            name="vllm:kvcellar_pool_slots",
            documentation="Slots of the host pool by state.",
            multiprocess_mode="mostrecent",
            labelnames=[*labelnames, "state"],
        )
        self._gauges: dict[tuple[int, str], Any] = {
            (engine, f"{state}_slots"): slots.labels(*values, state)
            for engine, values in engines
            for state in SLOT_STATES
        }
        for name, text in GAUGES.items():
            gauge = self._gauge_cls(
                name=f"vllm:kvcellar_{name}", documentation=text, multiprocess_mode="mostrecent", labelnames=labelnames
            )
            self._gauges.update({(engine, name): gauge.labels(*values) for engine, values in engines})
        self._of_tenants(labelnames, per_engine_labelvalues)
        lookups = self._histogram_cls(
            name="vllm:kvcellar_lookup_seconds",
            documentation="Duration of one lookup in the tier engine.",
            buckets=LOOKUP_BUCKETS,
            labelnames=labelnames,
        )
        self._lookups: dict[int, Any] = {engine: lookups.labels(*values) for engine, values in engines}

    def _of_tenants(self, labelnames: list[str], per_engine_labelvalues: dict[int, list[object]]) -> None:
        """Families by tenant. They have series once there are tenants."""
        self._values = per_engine_labelvalues
        self._tenant_counters: dict[str, Any] = {}
        families: dict[str, Any] = {}
        for name, (text, labels) in TENANT_COUNTERS.items():
            family = f"tenant_{family_of(name, labels)}"
            if family not in families:
                families[family] = self._counter_cls(
                    name=f"vllm:kvcellar_{family}", documentation=text, labelnames=[*labelnames, "tenant", *labels]
                )
            self._tenant_counters[name] = families[family]
        self._tenant_blocks = self._gauge_cls(
            name="vllm:kvcellar_tenant_blocks",
            documentation="Blocks of a tenant, by tier.",
            multiprocess_mode="mostrecent",
            labelnames=[*labelnames, "tenant", "tier"],
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Record one report. An exception here would end the front end's output, so there is none."""
        try:
            self._observe(transfer_stats_data, engine_idx)
        except (KeyError, TypeError, ValueError, AttributeError):
            logger.exception("KV Cellar: a report cannot be recorded: %.500r", transfer_stats_data)

    def _observe(self, transfer_stats_data: dict[str, Any], engine_idx: int) -> None:
        for name, amount in transfer_stats_data.get("counters", {}).items():
            self._counters[engine_idx, name].inc(amount)
        for reason, blocks in transfer_stats_data.get("dropped", {}).items():
            self._dropped[engine_idx, reason].inc(blocks)
        for name, value in transfer_stats_data.get("gauges", {}).items():
            self._gauges[engine_idx, name].set(value)
        values = self._values[engine_idx]
        for tenant, (counters, blocks) in transfer_stats_data.get("tenants", {}).items():
            for name, amount in counters.items():
                labels = TENANT_COUNTERS[name][1].values()
                self._tenant_counters[name].labels(*values, tenant, *labels).inc(amount)
            for tier, count in blocks.items():
                self._tenant_blocks.labels(*values, tenant, tier).set(count)
        for seconds in transfer_stats_data.get("lookup_seconds", []):
            self._lookups[engine_idx].observe(seconds)
