"""The dashboard and the alerts, made of the metrics that exist. Pure: text out, nothing read."""

import json
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT, PANEL_WIDTH = 24, 8, 8
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
E, R = 'instance=~"$instance"', "$__rate_interval"


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        title: what it shows.
        text: what to make of it.
        queries: PromQL by legend.
        unit: Grafana's name of the unit.
        stat: the last value in large digits, not a line.
        stacked: lines add up.
    """

    title: str
    text: str
    queries: dict[str, str]
    unit: str = "short"
    stat: bool = False
    stacked: bool = False


def rate(metric: str, by: str = "", more: str = "") -> str:
    """The growth of a counter in a second, summed."""
    labels = E + (f",{more}" if more else "")
    return f"sum{f' by ({by})' if by else ''} (rate({metric}{{{labels}}}[{R}]))"


def gauge(metric: str, by: str = "", how: str = "sum") -> str:
    """A gauge, over all engines."""
    return f"{how}{f' by ({by})' if by else ''} ({metric}{{{E}}})"


def quantile(share: float, metric: str) -> str:
    """A quantile of a histogram."""
    return f"histogram_quantile({share}, sum by (le) (rate({metric}_bucket{{{E}}}[{R}])))"


def quantiles(metric: str) -> dict[str, str]:
    """Median and 99th percentile of a histogram."""
    return {"p50": quantile(0.5, metric), "p99": quantile(0.99, metric)}


HITS, MISSES = "vllm:kvcellar_hit_tokens_total", "vllm:kvcellar_miss_tokens_total"
WHAT_IF_MISSES = "vllm:kvcellar_what_if_misses_total"

ENGINE = [
    Panel(
        "Engines in service",
        "1: blocks are stored and loaded. 0 before the pool is open, and after an internal error.",
        {"dram {{instance}}": gauge("vllm:kvcellar_in_service", "instance", "min")},
        stat=True,
    ),
    Panel(
        "Disks in service",
        "0 where there is no nvme tier, and while one is out of service after device errors.",
        {"nvme {{instance}}": gauge("vllm:kvcellar_nvme_in_service", "instance", "min")},
        stat=True,
    ),
    Panel(
        "Internal errors and requests left out",
        "Any internal error takes the tiers out of service until the next start: look at the log.",
        {
            "internal errors": f"sum (increase(vllm:kvcellar_internal_errors_total{{{E}}}[1h]))",
            "requests left out": f"sum (increase(vllm:kvcellar_left_out_requests_total{{{E}}}[1h]))",
        },
        stat=True,
    ),
    Panel(
        "Share of tokens loaded instead of computed",
        "Of the tokens that vLLM's own prefix cache did not have: how many each tier gave.",
        {"{{tier}}": f"{rate(HITS, 'tier')} / ignoring(tier) group_left ({rate(HITS)} + {rate(MISSES)})"},
        "percentunit",
        stacked=True,
    ),
    Panel(
        "Tokens loaded and missed",
        "Tokens a second, by the tier that gave them.",
        {"{{tier}}": rate(HITS, "tier"), "missed": rate(MISSES)},
    ),
    Panel(
        "What more room would bring",
        "Share of the blocks that vLLM's own cache did not have: found with the present capacity, with twice as much, "
        "and with a cache without end. Estimated from a sample: look at hours, and at the gaps between the lines.",
        {
            "{{capacity}}": f"clamp_min(1 - {rate(WHAT_IF_MISSES, 'capacity')} "
            f"/ ignoring(capacity) group_left {rate('vllm:kvcellar_what_if_blocks_total')}, 0)"
        },
        "percentunit",
    ),
    Panel(
        "Prefill saved",
        "Seconds of the model's time, in a second, that loaded tokens would have taken to compute, by tier: 1 is as "
        "much as one engine has.",
        {"{{tier}}": rate("vllm:kvcellar_saved_seconds_total", "tier")},
        stacked=True,
    ),
    Panel(
        "Pool slots",
        "`clean`: the disk has the block, too. It is a part of `filled`.",
        {"{{state}}": gauge("vllm:kvcellar_pool_slots", "state")},
    ),
    Panel(
        "Copies",
        "Bytes a second between KV cache and pool, over all ranks.",
        {"offload": rate("vllm:kvcellar_offload_bytes_total"), "load": rate("vllm:kvcellar_load_bytes_total")},
        "Bps",
    ),
    Panel(
        "Speed of copies",
        "Bytes in a second in which a copy was under way.",
        {
            "offload": f"{rate('vllm:kvcellar_offload_bytes_total')} / {rate('vllm:kvcellar_offload_seconds_total')}",
            "load": f"{rate('vllm:kvcellar_load_bytes_total')} / {rate('vllm:kvcellar_load_seconds_total')}",
        },
        "Bps",
    ),
    Panel(
        "Dropped blocks",
        "Blocks a second that were not kept, by reason. Each is a later miss and nothing worse.",
        {"{{reason}}": rate("vllm:kvcellar_dropped_blocks_total", "reason")},
    ),
    Panel(
        "Stored and evicted blocks",
        "Blocks a second. Evictions from dram with few hits: the pool is too small for what comes back.",
        {
            "stored": rate("vllm:kvcellar_stored_blocks_total"),
            "evicted from {{tier}}": rate("vllm:kvcellar_evicted_blocks_total", "tier"),
        },
    ),
    Panel(
        "Blocks by tenant",
        "Where `tenants` are configured. `other`: requests of none.",
        {"{{tenant}}, {{tier}}": gauge("vllm:kvcellar_tenant_blocks", "tenant, tier")},
    ),
    Panel(
        "Tokens loaded by tenant",
        "Tokens a second that a tenant's requests did not have to compute.",
        {"{{tenant}}, {{tier}}": rate("vllm:kvcellar_tenant_hit_tokens_total", "tenant, tier")},
    ),
    Panel(
        "Disk traffic",
        "Bytes a second, descriptors included.",
        {"written": rate("vllm:kvcellar_spilled_bytes_total"), "read": rate("vllm:kvcellar_restored_bytes_total")},
        "Bps",
    ),
    Panel(
        "Blocks on disk",
        "`retired` extents failed, or wait to be erased, and hold nothing.",
        {
            "blocks": gauge("vllm:kvcellar_nvme_blocks"),
            "extents": gauge("vllm:kvcellar_nvme_extents"),
            "retired": gauge("vllm:kvcellar_nvme_retired"),
        },
    ),
    Panel(
        "Disk trouble",
        "Refused or late transfers, extents whose checksums do not match, and outages, in an hour.",
        {
            "errors": f"sum (increase(vllm:kvcellar_disk_errors_total{{{E}}}[1h]))",
            "corrupt extents": f"sum (increase(vllm:kvcellar_corrupt_extents_total{{{E}}}[1h]))",
            "outages": f"sum (increase(vllm:kvcellar_nvme_outages_total{{{E}}}[1h]))",
        },
    ),
    Panel(
        "Disk transfers under way",
        "Blocks being written and read.",
        {"writing": gauge("vllm:kvcellar_nvme_writing"), "reading": gauge("vllm:kvcellar_nvme_reading")},
    ),
    Panel(
        "Failed loads and decisions to compute",
        "A failed load is computed instead. `computed instead` counts under load_policy auto and never.",
        {
            "failed": rate("vllm:kvcellar_load_failures_total"),
            "loaded from disk": rate("vllm:kvcellar_load_decisions_total"),
            "computed instead": rate("vllm:kvcellar_recompute_decisions_total"),
        },
    ),
    Panel(
        "Lookups",
        "Duration of one lookup in the tier engine. It is on vLLM's scheduling path.",
        quantiles("vllm:kvcellar_lookup_seconds"),
        "s",
    ),
    Panel(
        "Holds",
        "All three return to 0 when the engine is idle.",
        {
            "pins": gauge("vllm:kvcellar_pins"),
            "leases": gauge("vllm:kvcellar_leases"),
            "fences": gauge("vllm:kvcellar_fences"),
        },
    ),
    Panel(
        "Events that wait",
        "KVEvents that wait for a step of vLLM.",
        {"{{instance}}": gauge("vllm:kvcellar_pending_events", "instance")},
    ),
]

INDEX = [
    Panel(
        "Sources connected",
        "0: the line to an engine's publisher is down. Its blocks are kept until it is back.",
        {"{{source}}": gauge("kvcellar_index_source_connected", "source", "min")},
        stat=True,
    ),
    Panel(
        "Engines without missing events",
        "0: batches are missing and are being replayed.",
        {"{{engine}}": gauge("kvcellar_index_engine_live", "engine", "min")},
        stat=True,
    ),
    Panel(
        "Engines forgotten because events were lost",
        "Grows when a gap could not be replayed: give engines a replay_endpoint, or a larger buffer.",
        {"{{engine}}": gauge("kvcellar_index_engine_gaps", "engine")},
    ),
    Panel(
        "Blocks known",
        "Different blocks with a holder, and different sets of holders.",
        {"blocks": gauge("kvcellar_index_blocks"), "sets of holders": gauge("kvcellar_index_holder_sets")},
    ),
    Panel(
        "Memory",
        "At the bound new blocks are left out and counted as refused.",
        {"in use": gauge("kvcellar_index_memory_bytes"), "bound": gauge("kvcellar_index_memory_bytes_max")},
        "bytes",
    ),
    Panel(
        "Events",
        "Block events applied in a second.",
        {
            "stored": rate("kvcellar_index_blocks_stored_total"),
            "removed": rate("kvcellar_index_blocks_removed_total"),
            "batches": rate("kvcellar_index_batches_total"),
        },
    ),
    Panel(
        "Blocks left out",
        "Refused at the memory bound, of a size that does not fit the index, or waiting for a parent in vain.",
        {
            "refused": rate("kvcellar_index_blocks_refused_total"),
            "unbridged": rate("kvcellar_index_blocks_unbridged_total"),
            "orphans dropped": rate("kvcellar_index_orphans_dropped_total"),
        },
    ),
    Panel("Time to answer a question", "`/v1/score`, in the index.", quantiles("kvcellar_index_score_seconds"), "s"),
]

ROUTE = [
    Panel(
        "Usable engines",
        "0: the engine does not answer, or drains.",
        {"{{engine}}": gauge("kvcellar_route_engine_usable", "engine", "min")},
        stat=True,
    ),
    Panel(
        "Time to the first byte",
        "From the decision to the first byte of the answer's body.",
        {
            "p50": quantile(0.5, "kvcellar_route_ttft_seconds"),
            "p90": quantile(0.9, "kvcellar_route_ttft_seconds"),
            "p99": quantile(0.99, "kvcellar_route_ttft_seconds"),
        },
        "s",
    ),
    Panel(
        "Time to decide",
        "From the whole request to the decision.",
        quantiles("kvcellar_route_decide_seconds"),
        "s",
    ),
    Panel(
        "Decisions",
        "Requests a second, by engine.",
        {"{{engine}}": rate("kvcellar_route_decisions_total", "engine")},
        stacked=True,
    ),
    Panel(
        "Requests in flight",
        "By engine.",
        {"{{engine}}": gauge("kvcellar_route_engine_in_flight", "engine")},
        stacked=True,
    ),
    Panel(
        "How requests ended",
        "Requests a second, by outcome. `done` is the good one.",
        {"{{outcome}}": rate("kvcellar_route_requests_total", "outcome")},
    ),
    Panel(
        "Refused requests and retries",
        "Requests a second that were not passed on, by reason, and that a second engine got.",
        {
            "{{reason}}": rate("kvcellar_route_refused_total", "reason"),
            "retried": rate("kvcellar_route_requests_retried_total"),
        },
    ),
    Panel(
        "Predicted and reported cached tokens",
        "Tokens a second, where the engine reported. Lines apart: predictions are off.",
        {
            "predicted": rate("kvcellar_route_predicted_cached_tokens_total"),
            "reported": rate("kvcellar_route_reported_cached_tokens_total"),
        },
    ),
    Panel(
        "Prompts without exact token ids",
        "Requests a second, by reason: they are tokenized by an engine, or estimated.",
        {
            "{{reason}}": rate("kvcellar_route_inexact_total", "reason"),
            "mismatched": rate("kvcellar_route_prompts_mismatched_total"),
        },
    ),
    Panel(
        "Prefill speed",
        "Prompt tokens a second, as learned from answers.",
        {"{{engine}}": gauge("kvcellar_route_engine_prefill_rate", "engine", "avg")},
    ),
    Panel(
        "Requests that wait",
        "In the router's queue, by priority: engines have no room for them. Empty without --queue.",
        {"{{priority}}": gauge("kvcellar_route_queue_requests", "priority")},
        stacked=True,
    ),
    Panel(
        "Wait in the queue",
        "Of requests that were let through. Those that had to go count under refused.",
        quantiles("kvcellar_route_queue_seconds"),
        "s",
    ),
    Panel(
        "Engines whose requests fail",
        "1: the engine answers scrapes, but not requests; it gets one now and then.",
        {"{{engine}}": gauge("kvcellar_route_engine_broken", "engine", "max")},
    ),
    Panel(
        "Age of events",
        "Since an engine's last events. One that is asked for prompts and grows older for long tells nothing.",
        {"{{engine}}": gauge("kvcellar_route_events_age_seconds", "engine", "max")},
        "s",
    ),
    Panel(
        "Prompts computed for another engine",
        "By the end of the first step. After a failed one the second engine computes the prompt itself.",
        {"{{outcome}}": rate("kvcellar_route_prefills_total", "outcome")},
        "reqps",
        stacked=True,
    ),
]

ROWS = {"Engines": ENGINE, "Index": INDEX, "Router": ROUTE}


@dataclass(frozen=True)
class Alert:
    """One alert: when it fires, for how long that must hold, and what to do."""

    name: str
    when: str
    lasting: str
    severity: str
    summary: str


ALERTS = [
    Alert(
        "KVCellarInternalError",
        "increase(vllm:kvcellar_internal_errors_total[15m]) > 0",
        "0m",
        "warning",
        "An internal error took the tiers of {{ $labels.instance }} out of service until its next start.",
    ),
    Alert(
        "KVCellarOutOfService",
        "vllm:kvcellar_in_service == 0",
        "10m",
        "warning",
        "{{ $labels.instance }} serves without KV Cellar.",
    ),
    Alert(
        "KVCellarDiskOutages",
        "increase(vllm:kvcellar_nvme_outages_total[1h]) > 0",
        "0m",
        "warning",
        "The disk of {{ $labels.instance }} went out of service after device errors.",
    ),
    Alert(
        "KVCellarCorruptExtents",
        "increase(vllm:kvcellar_corrupt_extents_total[1h]) > 0",
        "0m",
        "warning",
        "The disk of {{ $labels.instance }} returned bytes that do not match their checksums.",
    ),
    Alert(
        "KVCellarLoadFailures",
        "rate(vllm:kvcellar_load_failures_total[15m]) > 0.1",
        "15m",
        "warning",
        "Loads of {{ $labels.instance }} fail and are computed instead.",
    ),
    Alert(
        "KVCellarIndexSourceDown",
        "kvcellar_index_source_connected == 0",
        "5m",
        "warning",
        "The index {{ $labels.instance }} cannot reach {{ $labels.source }}.",
    ),
    Alert(
        "KVCellarIndexFull",
        "rate(kvcellar_index_blocks_refused_total[15m]) > 0",
        "15m",
        "warning",
        "The index {{ $labels.instance }} leaves blocks out at its memory bound.",
    ),
    Alert(
        "KVCellarRouteNoEngine",
        "sum by (instance) (kvcellar_route_engine_usable) == 0",
        "1m",
        "critical",
        "The router {{ $labels.instance }} has no usable engine.",
    ),
    Alert(
        "KVCellarRouteRefuses",
        'sum by (instance) (rate(kvcellar_route_refused_total{reason="no_engine"}[5m])) > 0',
        "5m",
        "critical",
        "The router {{ $labels.instance }} refuses requests because no engine can take them.",
    ),
    Alert(
        "KVCellarRouteFailures",
        'sum by (instance) (rate(kvcellar_route_requests_total{outcome=~"failed|broken|timeout"}[5m])) > 0.1',
        "5m",
        "warning",
        "Requests through the router {{ $labels.instance }} fail in engines.",
    ),
    Alert(
        "KVCellarRouteEngineBroken",
        "max by (instance, engine) (kvcellar_route_engine_broken) == 1",
        "5m",
        "warning",
        "The engine {{ $labels.engine }} answers scrapes, but its requests fail.",
    ),
    Alert(
        "KVCellarRouteEventsMissing",
        "min by (instance, engine) (kvcellar_route_events_connected) == 0",
        "5m",
        "warning",
        "The router {{ $labels.instance }} has no connection to the events of {{ $labels.engine }}.",
    ),
    Alert(
        "KVCellarRouteQueueDrops",
        'sum by (instance) (rate(kvcellar_route_refused_total{reason=~"queue_full|displaced|deadline"}[5m])) > 0',
        "10m",
        "warning",
        "The fleet behind the router {{ $labels.instance }} is too small: requests have to go.",
    ),
]


def queries() -> list[str]:
    """All queries of the dashboard and of the alerts."""
    shown = [query for panels in ROWS.values() for panel in panels for query in panel.queries.values()]
    return [*shown, *(alert.when for alert in ALERTS)]


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    if panel.stacked:
        defaults["custom"] = {"stacking": {"mode": "normal"}, "fillOpacity": 20}
    targets = [
        {"refId": chr(ord("A") + at), "datasource": SOURCE, "expr": query, "legendFormat": legend}
        for at, (legend, query) in enumerate(panel.queries.items())
    ]
    return {
        "id": number,
        "type": "stat" if panel.stat else "timeseries",
        "title": panel.title,
        "description": panel.text,
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "targets": targets,
    }


def _panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    top = 0
    for title, panels in ROWS.items():
        place = {"x": 0, "y": top, "w": WIDTH, "h": 1}
        found.append({"id": len(found) + 1, "type": "row", "title": title, "gridPos": place, "panels": []})
        top += 1
        for at, panel in enumerate(panels):
            line, column = divmod(at, WIDTH // PANEL_WIDTH)
            place = {"x": column * PANEL_WIDTH, "y": top + line * HEIGHT, "w": PANEL_WIDTH, "h": HEIGHT}
            found.append(_panel(panel, len(found) + 1, place))
        top += -(-len(panels) // (WIDTH // PANEL_WIDTH)) * HEIGHT
    return found


def text() -> str:
    """The dashboard, as Grafana imports it."""
    named = '{__name__=~"vllm:kvcellar_in_service|kvcellar_index_blocks|kvcellar_route_engine_usable"}'
    instances = f"label_values({named}, instance)"
    board = {
        "uid": "kvcellar",
        "title": "KV Cellar",
        "description": "Made by scripts/docs. Change scripts/docs_lib/dashboard.py, not this file.",
        "tags": ["vllm", "kvcellar"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"},
                {
                    "name": "instance",
                    "type": "query",
                    "label": "Instance",
                    "datasource": SOURCE,
                    "query": {"query": instances, "refId": "instances"},
                    "definition": instances,
                    "refresh": 2,
                    "multi": True,
                    "includeAll": True,
                    "current": {"text": "All", "value": "$__all"},
                },
            ]
        },
        "annotations": {"list": []},
        "panels": _panels(),
    }
    return json.dumps(board, indent=2) + "\n"


def alerts() -> str:
    """The alerts, as a file of rules for Prometheus. Texts are JSON's, which YAML reads as they are."""
    lines = [
        "# Made by scripts/docs. Change scripts/docs_lib/dashboard.py, not this file.",
        "groups:",
        "  - name: kvcellar",
        "    rules:",
    ]
    for alert in ALERTS:
        lines += [
            f"      - alert: {alert.name}",
            f"        expr: {json.dumps(alert.when)}",
            f"        for: {alert.lasting}",
            "        labels:",
            f"          severity: {alert.severity}",
            "        annotations:",
            f"          summary: {json.dumps(alert.summary)}",
        ]
    return "\n".join(lines) + "\n"
