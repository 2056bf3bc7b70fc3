"""Commands and settings that pages show can be given as they stand: nothing is run, everything is parsed."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from docs_lib.pages import FENCE, all_pages, name
from docs_lib.prose import HISTORY
from kvcellar import command as program
from kvcellar._native import Config

INLINE = re.compile(r"`(kvcellar [^`]+)`")
SETTINGS = re.compile(r"--kv-transfer-config\s+(?:\\\s+)?'(\{.*?\})'", re.DOTALL)


def fenced(text: str) -> str:
    """All fenced blocks of a page, with continued lines joined."""
    kept, inside = [], False
    for line in text.splitlines():
        if FENCE.match(line):
            inside = not inside
        elif inside:
            kept.append(line)
    return "\n".join(kept).replace("\\\n", " ")


def commands(path: Path) -> Iterator[str]:
    """Every `kvcellar` command that a page shows."""
    text = path.read_text()
    for line in fenced(text).splitlines():
        if line.strip().startswith("kvcellar "):
            yield line.split(" #")[0].strip()
    for command in INLINE.findall(text.replace("\n", " ")):
        # Optional parts stand in brackets; a command that is only begun ends in dots.
        if not command.endswith("..."):
            yield command.replace("[", "").replace("]", "")


def transfer_settings(path: Path) -> Iterator[dict[str, object]]:
    """Every object that a page gives to `--kv-transfer-config`."""
    for text in SETTINGS.findall(path.read_text()):
        yield json.loads(text)


PAGES = [path for path in all_pages() if path != HISTORY]
COMMANDS = sorted({(name(path), command) for path in PAGES for command in commands(path)})
SETTINGS_SHOWN = [(name(path), settings) for path in PAGES for settings in transfer_settings(path)]


def test_pages_show_commands_and_settings() -> None:
    assert len(COMMANDS) > 30
    assert len(SETTINGS_SHOWN) >= 5


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_a_command_is_understood(page: str, command: str, capfd: pytest.CaptureFixture[str]) -> None:
    # Everything before `--help` is parsed, and then nothing is done.
    code = program.run([*shlex.split(command)[1:], "--help"])
    said = capfd.readouterr().err
    # Text may name an option without its value.
    assert code == 0 or "a value is required" in said, f"{page}: {command}: {said}"


@pytest.mark.parametrize(("page", "settings"), SETTINGS_SHOWN)
def test_settings_are_accepted(page: str, settings: dict[str, object]) -> None:
    extra = settings.get("kv_connector_extra_config", {})
    assert isinstance(extra, dict)
    for one in extra.get("connectors", [settings]):
        if one["kv_connector"] == "KVCellarConnector":
            Config.parse(json.dumps(one.get("kv_connector_extra_config", {})))
