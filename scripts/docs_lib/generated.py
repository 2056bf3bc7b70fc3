"""What is generated: tables of keys and metrics in pages, and the dashboard."""

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from docs_lib import dashboard, declared, keys, layouts, slot_sizes
from docs_lib.pages import DOCS, name, table, with_part

CONFIGURATION = DOCS / "configuration.md"
METRICS = DOCS / "metrics.md"
FORMATS = DOCS / "formats.md"
MODELS = DOCS / "models.md"
DASHBOARD = DOCS / "grafana" / "kvcellar.json"
ALERTS = DOCS / "grafana" / "alerts.yaml"


def _keys(found: list[keys.Key]) -> str:
    rows = [(f"[`{key.name}`](#{key.name})", key.write, key.default) for key in found]
    return table(("key", "write", "default"), rows)


def _metrics(found: list[declared.Metric]) -> str:
    rows = [
        (f"`{metric.name}`", metric.kind, ", ".join(f"`{label}`" for label in metric.labels) or "-", metric.text)
        for metric in found
    ]
    return table(("metric", "kind", "labels", "meaning"), rows)


def _layout(file: str, struct: str) -> str:
    rows = [(str(offset), str(size), f"`{field}`") for offset, size, field in layouts.fields(file, struct)]
    return table(("offset", "bytes", "field"), rows)


def _versions() -> str:
    formats = (
        ("pool file", "engine/pool/header.rs", "FORMAT_VERSION"),
        ("slot descriptor and seal", "block/descriptor.rs", "VERSION"),
        ("superblock, and everything in a store", "engine/nvme/superblock.rs", "FORMAT_VERSION"),
        ("snapshot", "engine/nvme/snapshot.rs", "VERSION"),
    )
    return table(("format", "version"), [(name, layouts.constant(file, constant)) for name, file, constant in formats])


def _slot_sizes() -> str:
    return table(("model", "tokens of a block", "slot", "MB per 1,000 tokens", "wasted"), slot_sizes.rows())


STRUCTS = {
    "pool header": ("engine/pool/header.rs", "Purpose"),
    "pool owner": ("engine/pool/header.rs", "Owner"),
    "slot line": ("engine/pool/slot_table.rs", "SlotLine"),
    "descriptor": ("block/descriptor.rs", "Fixed"),
    "seal": ("block/descriptor.rs", "RawSeal"),
    "superblock": ("engine/nvme/superblock.rs", "SuperblockFields"),
    "snapshot header": ("engine/nvme/snapshot.rs", "SnapshotHeader"),
    "snapshot record": ("engine/nvme/snapshot.rs", "SnapshotRecord"),
    "block copy": ("block/plan.rs", "BlockCopy"),
}

PARTS: list[tuple[Path, str, Callable[[], str]]] = [
    (CONFIGURATION, "engine keys", lambda: _keys(keys.engine_keys())),
    (CONFIGURATION, "nvme keys", lambda: _keys(keys.nvme_keys())),
    (CONFIGURATION, "request keys", lambda: _keys(keys.request_keys())),
    (METRICS, "engine metrics", lambda: _metrics(declared.engine())),
    (METRICS, "index metrics", lambda: _metrics(declared.index())),
    (METRICS, "route metrics", lambda: _metrics(declared.route())),
    (FORMATS, "versions", _versions),
    (MODELS, "slot sizes", _slot_sizes),
    *((FORMATS, part, partial(_layout, *place)) for part, place in STRUCTS.items()),
]


def files() -> dict[Path, str]:
    """Every file with generated parts, as it should be."""
    texts: dict[Path, str] = {}
    for path, part, content in PARTS:
        texts[path] = with_part(texts.get(path) or path.read_text(), part, content())
    texts[DASHBOARD], texts[ALERTS] = dashboard.text(), dashboard.alerts()
    return texts


def keys_without_text() -> Iterator[str]:
    """Keys that have no section, and sections whose key is no more."""
    known = {key.name for key in (*keys.engine_keys(), *keys.nvme_keys(), *keys.request_keys())}
    described = set(re.findall(r"^### `(\w+)`$", CONFIGURATION.read_text(), re.MULTILINE))
    for key in sorted(known - described):
        yield f"{name(CONFIGURATION)}: there is no section `{key}`: say what it does"
    for key in sorted(described - known):
        yield f"{name(CONFIGURATION)}: no source knows the key `{key}`: remove its section"
