"""The documentation says what the sources and the committed reports say, and the dashboard asks for what there is."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from docs_lib import dashboard, declared, generated, keys, layouts, prose
from docs_lib.pages import ROOT

README_LINES_MAX = 150
NAME = re.compile(r"\b(?:vllm:)?kvcellar_\w+")
# Beside the metrics: what Prometheus adds to every sample, and vLLM's own labels.
LABELS_OF_OTHERS = {"instance", "job", "le", "engine", "model_name"}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Run one of the scripts with this interpreter."""
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, cwd=ROOT / "scripts")


def test_numbers_are_those_of_the_committed_reports() -> None:
    checked = run(str(ROOT / "scripts" / "readme_numbers"), "--check")
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_pages_are_up_to_date_and_their_links_resolve() -> None:
    checked = run("-m", "docs_lib", "--check")
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES_MAX


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A page of its own, in a repository of its own."""
    for module in (prose, sys.modules["docs_lib.pages"]):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "other.md").write_text("# One `two` & three\n\n## Twice\n\n## Twice\n")
    return tmp_path / "page.md"


@pytest.mark.parametrize(
    "link",
    ["other.md", "other.md#one-two--three", "other.md#twice-1", "#here", "https://example.org/x", "other.md 'a title'"],
)
def test_links_that_resolve(page: Path, link: str) -> None:
    page.write_text(f"# Here\n\nSee [it]({link}) and ![a picture]({link}).\n")
    assert not list(prose.broken_links(page))


@pytest.mark.parametrize(
    "link", ["gone.md", "other.md#gone", "other.md#twice-2", "#gone", "../outside.md", "/other.md"]
)
def test_links_that_lead_nowhere_are_found(page: Path, link: str) -> None:
    page.write_text(f"# Here\n\n`[code](gone.md)`\n\n```\n[code](gone.md)\n```\n\nSee [it]({link}).\n\n[1]: {link}\n")
    found = list(prose.broken_links(page))
    assert len(found) == 2, found
    assert found[0].startswith("page.md:9: ")


def test_files_and_metrics_that_are_not_there_are_found(page: Path) -> None:
    page.write_text("`src/gone.rs` and `vllm:kvcellar_gone_total`, `vllm:kvcellar_hit_tokens_total`\n" + "x " * 60)
    assert [text.split(": ")[1] for text in prose.missing_places(page)] == ["`src/gone.rs` is not there"]
    assert len(list(prose.unknown_metrics(page))) == 1
    assert len(list(prose.long_lines(page))) == 1


def test_every_key_is_read_from_the_sources() -> None:
    known = {key.name: key for key in (*keys.engine_keys(), *keys.nvme_keys(), *keys.request_keys())}
    assert len(known) >= 25
    assert known["dram_size"].default == '`"4GiB"`'
    assert known["nvme_engine"].default == '`"auto"`'
    assert known["store"].default == "`true`"
    assert known["clean_percent"].write == "a whole number from 0 to 100"


def test_every_metric_is_read_from_the_sources() -> None:
    index, route = declared.INDEX.read_text(), declared.ROUTE.read_text()
    assert len(declared.index()) == len(re.findall(r"(?:number|count)\(&mut registry|registry\.register\(\"", index))
    assert len(declared.route()) == len(re.findall(r"\b(?:add|counts)\(\s*registry,\s*\"", route))
    families = re.findall(r'name=f?"vllm:kvcellar_', declared.STATS.read_text())
    assert len(families) == 7, "another family in stats.py: teach scripts/docs_lib/declared.py to read it"
    names = [metric.name for metric in declared.everything()]
    assert len(names) == len(set(names))


def test_layouts_are_those_that_the_sources_assert() -> None:
    def size(part: str) -> int:
        offset, length, _ = layouts.fields(*generated.STRUCTS[part])[-1]
        return offset + length

    assert size("descriptor") == 128
    assert size("seal") == size("snapshot header") == size("snapshot record") == 64
    assert size("slot line") <= 64
    assert size("block copy") == 16


@pytest.mark.parametrize("query", dashboard.queries())
def test_queries_ask_for_metrics_and_labels_that_exist(query: str) -> None:
    samples = {sample: metric for metric in declared.everything() for sample in metric.samples}
    named = NAME.findall(query)
    assert named
    assert set(named) <= samples.keys()
    labels = {label for name in named for label in samples[name].labels} | LABELS_OF_OTHERS
    asked = {
        label.strip() for group in re.findall(r"\b(?:by|ignoring) \(([^)]*)\)", query) for label in group.split(",")
    }
    asked |= set(re.findall(r"[{,]\s*(\w+)\s*=~?", query))
    assert asked - {"tier"} <= labels
    assert query.count("(") == query.count(")")
    # A counter is asked for its growth, anything else for its value.
    for name in named:
        grows = samples[name].kind != "gauge"
        assert grows == bool(re.search(rf"(?:rate|increase)\({re.escape(name)}\b", query)), name


def test_the_dashboard_is_one_that_can_be_imported() -> None:
    board = json.loads(generated.DASHBOARD.read_text())
    panels = board["panels"]
    assert {"title", "uid", "schemaVersion", "templating", "time"} <= board.keys()
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells)), "panels overlap"
    assert max(x for x, _ in cells) < dashboard.WIDTH
    shown = [target for panel in panels for target in panel.get("targets", [])]
    assert all(target["expr"] and target["legendFormat"] for target in shown)


def test_every_alert_is_explained() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    assert all(f"`{alert.name}`" in page for alert in dashboard.ALERTS)
    rules = generated.ALERTS.read_text()
    yaml = pytest.importorskip("yaml")
    (group,) = yaml.safe_load(rules)["groups"]
    assert [rule["alert"] for rule in group["rules"]] == [alert.name for alert in dashboard.ALERTS]
