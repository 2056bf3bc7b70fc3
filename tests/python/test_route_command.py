"""`kvcellar route` and `kvcellar bench route`: what they refuse by name, and that a small measurement runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deadlines import deadline

ENGINE = ("--engine", "http://127.0.0.1:9")


def kvcellar(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command that ends by itself."""
    command = [sys.executable, "-m", "kvcellar", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=deadline(120.0))


def picker_config(folder: Path, plugin: str) -> str:
    """A file of kind EndpointPickerConfig with one plugin."""
    path = folder / "picker.yaml"
    path.write_text(f"apiVersion: llm-d.ai/v1\nkind: EndpointPickerConfig\nplugins:\n- type: {plugin}\n")
    return str(path)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "no front end"),
        (("--http", "127.0.0.1:0", "--mode", "precise"), "precise needs events"),
        (("--http", "127.0.0.1:0", "--scorers", "prefix=1"), "--policy scorers"),
        (("--http", "127.0.0.1:0", "--otlp", "localhost:4317"), "http://127.0.0.1:4317"),
        (("--http", "127.0.0.1:0", "--engines-file", "/nowhere"), "JSON list of engines"),
        (("--http", "127.0.0.1:0", "--tokenizer", "/nowhere"), "Hugging Face model"),
    ],
)
def test_what_cannot_work_is_refused_by_name(flags: tuple[str, ...], said: str) -> None:
    done = kvcellar("route", "--admin", "127.0.0.1:0", *ENGINE, *flags)
    assert done.returncode == 1 and said in done.stderr, done.stderr


def test_a_picker_config_is_refused_by_plugin(tmp_path: Path) -> None:
    config = picker_config(tmp_path, "prefix-cache-affinity-filter")
    done = kvcellar("route", "--http", "127.0.0.1:0", *ENGINE, "--picker-config", config)
    assert done.returncode == 1 and "--policy cost" in done.stderr, done.stderr
    config = picker_config(tmp_path, "queue-scorer")
    done = kvcellar("route", "--http", "127.0.0.1:0", *ENGINE, "--picker-config", config, "--mode", "precise")
    assert done.returncode == 2 and "--mode" in done.stderr, done.stderr


def byte_tokenizer(folder: Path) -> str:
    """A directory with a byte-level tokenizer of no merges, in the form of a Hugging Face model's."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    alphabet = [chr(byte) for byte in visible] + [chr(256 + at) for at in range(len(hidden))]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    made = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": level,
        "decoder": level,
        "model": {"type": "BPE", "vocab": {letter: at for at, letter in enumerate(alphabet)}, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(made))
    return str(folder)


def test_a_small_measurement_runs(tmp_path: Path) -> None:
    sizes = ["--tokens", "300", "--engines", "2", "--decisions", "3", "--requests", "4", "--repetitions", "1"]
    done = kvcellar("bench", "route", "--tokenizer", byte_tokenizer(tmp_path), *sizes, "--json")
    assert done.returncode == 0, done.stderr
    values = {row["name"]: row["value"] for row in json.loads(done.stdout)["results"]}
    for sort in ("seen text", "new text", "ids", "approximate"):
        assert values[f"decision, 300 tokens, 2 engines, {sort}, p50"] > 0
    assert values["proxy, 300 tokens, precise, p50"] > 0
    refused = kvcellar("bench", "route", "--tokenizer", str(tmp_path), "--engines", "0")
    assert refused.returncode == 1 and "engines" in refused.stderr
