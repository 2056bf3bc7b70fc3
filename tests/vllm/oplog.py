"""The engine's operation log (`trace_file`): JSON lines in the order of execution."""

import json
from pathlib import Path
from typing import Any

Op = dict[str, Any]


def read(path: Path) -> list[Op]:
    """All whole lines written so far; a last line without its end is still being written."""
    if not path.exists():
        return []
    text = path.read_text()
    whole, _, _ = text.rpartition("\n")
    return [json.loads(line) for line in whole.splitlines() if line]


def outstanding(ops: list[Op]) -> int:
    """Loads and batches of stores that have begun and not ended."""
    loads: set[str] = set()
    batches: dict[int, set[str]] = {}
    for op in ops:
        match op["op"]:
            case "load":
                loads.add(op["req"])
            case "load_done":
                loads.discard(op["req"])
            case "store" if op["keys"]:
                batches.setdefault(op["batch"], set()).update(op["keys"])
            case "filled" | "lost" if op["batch"] in batches:
                batches[op["batch"]] -= set(op["keys"])
                if not batches[op["batch"]]:
                    del batches[op["batch"]]
    return len(loads) + len(batches)


def hit_tokens(ops: list[Op]) -> int:
    """Tokens that vLLM took from us."""
    return sum(op["external"] for op in ops if op["op"] == "load")


def loaded_requests(ops: list[Op]) -> set[str]:
    """Requests that loaded something."""
    return {op["req"] for op in ops if op["op"] == "load" and op["external"]}
