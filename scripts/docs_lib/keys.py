"""The configuration keys as the sources list them: what to write for each, and its default."""

import re
from dataclasses import dataclass

from docs_lib.pages import ROOT

CONFIG = ROOT / "src" / "engine" / "config"
# Defaults that the sources work out when an engine starts.
WORKED_OUT = {
    "copy_threads": "a quarter of the cores, at least 1, at most 4",
    "local_engines": "the number of data-parallel ranks that vLLM starts here",
    "nvme_write_budget": "none: no bound",
    "nvme_reserve": "a twentieth of the file system, at most 10 GiB",
    "nvme_dir": "none: no nvme tier",
    "retention": "none: blocks do not expire",
    "tenants": "none",
    "trace_file": "none",
    "record_trace": "none",
}


@dataclass(frozen=True)
class Key:
    """One key: its name, what a user may write, and its default, as text."""

    name: str
    write: str
    default: str


def listed(source: str) -> list[tuple[str, str]]:
    """Names and what to write, from the `KEYS` of a source file."""
    body = source.split("const KEYS:", 1)[1].split("];", 1)[0]
    return [
        (name, write.replace('\\"', '"')) for name, write in re.findall(r'\(\s*"(\w+)",\s*"((?:[^"\\]|\\.)*)"', body)
    ]


def _fields(source: str) -> dict[str, str]:
    """The field that each key sets."""
    body = source.split("fn set(", 1)[1]
    arms = re.split(r'\n\s*"(\w+)" =>', body)
    found = {}
    for name, arm in zip(arms[1::2], arms[2::2], strict=True):
        field = re.search(r"self\.(\w+)", arm)
        if field:
            found[name] = field[1]
    return found


def _defaults(source: str, kind: str) -> dict[str, str]:
    """The expression that each field begins with."""
    body = source.split(f"impl Default for {kind}", 1)[1].split("\n}\n", 1)[0]
    return dict(re.findall(r"^\s+(\w+): (.+),$", body, re.MULTILINE))


def _size(source: str, constant: str) -> str:
    """A size constant as a user would write it."""
    shift = re.search(rf"const {constant}: u64 = (\d+) << 30;", source)
    if shift is None:
        message = f"{constant} is no whole number of GiB any more: teach scripts/docs_lib/keys.py to read it"
        raise ValueError(message)
    return f'"{shift[1]}GiB"'


def _shown(source: str, key: str, expression: str) -> str:
    """A default as a user would write it."""
    if expression == "None" or expression.endswith("::default()"):
        return WORKED_OUT[key]
    if expression.endswith("_DEFAULT"):
        return f"`{_size(source, expression)}`"
    if expression == "String::new()":
        return '`""`'
    path = re.fullmatch(r'PathBuf::from\("(.+)"\)', expression)
    if path:
        return f'`"{path[1]}"`'
    variant = re.fullmatch(r"\w+::(\w+)", expression)
    if variant:
        snake = re.sub(r"(?<!^)(?=[A-Z])", "_", variant[1]).lower()
        return f'`"{snake}"`'
    return f"`{expression}`"


def _of(file: str, kind: str) -> list[Key]:
    source = (CONFIG / file).read_text()
    fields, defaults = _fields(source), _defaults(source, kind)
    return [
        Key(name, write, _shown(source, name, defaults.get(fields[name], "None"))) for name, write in listed(source)
    ]


def engine_keys() -> list[Key]:
    """Keys of `kv_connector_extra_config` that are not about the disk."""
    return _of("mod.rs", "Config")


def nvme_keys() -> list[Key]:
    """Keys of `kv_connector_extra_config` about the nvme tier."""
    return _of("nvme.rs", "NvmeConfig")


def request_keys() -> list[Key]:
    """Keys of one request's `kv_transfer_params`."""
    source = (CONFIG / "controls.rs").read_text()
    body = source.split("impl Default for Controls", 1)[1].split("\n}\n", 1)[0]
    defaults = dict(re.findall(r"(\w+): (\w+)", body))
    shown = {"true": "`true`", "false": "`false`"}
    worked_out = {"max_load_tokens": "no bound", "pin": "none", "tenant": "none"}
    return [Key(name, write, worked_out.get(name) or shown[defaults[name]]) for name, write in listed(source)]
