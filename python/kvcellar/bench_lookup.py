"""``kvcellar bench lookup`` through Python: the native core, the way of ``list[bytes]`` through the FFI, and "
"vLLM's own manager.

Measured in one run, interleaved. vLLM's manager (``vllm.v1.kv_offload.cpu``) is asked in the way its own connector
asks it: one call a
block for lookups, one call a request for allocation. Without vLLM its rows are left out.
"""

import argparse
import gc
import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from kvcellar import _native, command

NANOSECONDS = 1e9


def _measured(name: str, values: Sequence[float]) -> dict[str, Any]:
    quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {
        "name": name,
        "value": statistics.median(values),
        "unit": "ns/block",
        "spread": (quartiles[2] - quartiles[0]) / 2,
        "n": len(values),
    }


def _goal(name: str, wanted: float, value: float) -> dict[str, Any]:
    return {"name": name, "goal": f"at least {wanted:g}", "value": value, "met": value >= wanted}


def _hashes(first: int, count: int) -> list[bytes]:
    return [hashlib.sha256(number.to_bytes(8, "little")).digest() for number in range(first, first + count)]


def _timed(count: int, expected: int, work: Callable[[], int]) -> float:
    """Nanoseconds for each of ``count`` blocks; ``work`` must return ``expected``, or it measured something else."""
    started = time.perf_counter()
    found = work()
    elapsed = time.perf_counter() - started
    if found != expected:
        raise RuntimeError(f"the benchmark expected {expected} blocks and got {found}")
    return elapsed * NANOSECONDS / count


class VllmManager:
    """vLLM's own dram tier, filled."""

    def __init__(self, hashes: list[bytes]) -> None:
        from vllm.v1.kv_offload.base import LookupResult, ReqContext, make_offload_key
        from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager

        self._key = make_offload_key
        self._context = ReqContext
        self._hit = LookupResult.HIT
        self._manager = CPUOffloadingManager(num_chunks=len(hashes))
        self._requests = 0
        for start in range(0, len(hashes), 32_768):
            self.allocate(self.keys(hashes[start : start + 32_768]))

    def keys(self, hashes: list[bytes]) -> list[Any]:
        """vLLM's keys; made once a request, so outside the timing."""
        return [self._key(block_hash, 0) for block_hash in hashes]

    def _new_context(self) -> Any:
        self._requests += 1
        return self._context(req_id=str(self._requests), kv_transfer_params=None)

    def lookup(self, keys: list[Any]) -> int:
        """Blocks found, one call each, as vLLM's connector asks."""
        context = self._new_context()
        lookup, hit = self._manager.lookup, self._hit
        return sum(1 for key in keys if lookup(key, context) is hit)

    def allocate(self, keys: list[Any]) -> int:
        """Take chunks for new blocks, evicting others, and make them visible. Returns how many were evicted."""
        context = self._new_context()
        prepared = self._manager.prepare_store(keys, context)
        if prepared is None:
            raise RuntimeError("vLLM's manager refused to allocate: the benchmark is wrong")
        self._manager.complete_store(keys, context)
        self._manager.on_request_finished(context)
        return len(prepared.evicted_keys)


def _vllm_manager(hashes: list[bytes]) -> VllmManager | None:
    try:
        return VllmManager(hashes)
    except ImportError:
        return None


def measure(blocks: int, request: int, repetitions: int) -> dict[str, Any] | None:
    """Run everything and return the report in the common shape; ``None`` where the core's part failed."""
    sizes = [f"--blocks={blocks}", f"--request={request}", f"--repetitions={repetitions}"]
    core = command.output(["bench", "lookup", *sizes, "--json"])
    if core is None:
        return None
    report: dict[str, Any] = json.loads(core)
    known = _hashes(0, blocks)
    ours = _native.WarmTable(known)
    theirs = _vllm_manager(known)
    gc.disable()
    rows: dict[str, list[float]] = {}
    for repetition in range(repetitions):
        start = repetition * request % (blocks - request + 1)
        # New objects each time, as vLLM's own hashing makes them.
        wanted = [bytes(bytearray(block_hash)) for block_hash in known[start : start + request]]
        rows.setdefault("ffi_hit", []).append(_timed(request, request, partial(ours.lookup, wanted)))
        if theirs is not None:
            keys = theirs.keys(wanted)
            rows.setdefault("vllm_hit", []).append(_timed(request, request, partial(theirs.lookup, keys)))
    for repetition in range(repetitions):
        new = _hashes(blocks + repetition * request, request)
        # Both tables are full: every new block evicts another.
        rows.setdefault("ffi_allocate_evict", []).append(_timed(request, request, partial(ours.allocate, new)))
        if theirs is not None:
            keys = theirs.keys(new)
            rows.setdefault("vllm_allocate_evict", []).append(_timed(request, request, partial(theirs.allocate, keys)))
    gc.enable()
    report["results"] += [_measured(name, values) for name, values in rows.items()]
    value = {row["name"]: row["value"] for row in report["results"]}
    if theirs is not None:
        report["goals"] += [
            _goal("FFI lookup, times faster than vLLM's", 8, value["vllm_hit"] / value["ffi_hit"]),
            _goal(
                "FFI allocation with eviction, times faster than vLLM's",
                20,
                value["vllm_allocate_evict"] / value["ffi_allocate_evict"],
            ),
        ]
    return report


def _print(report: dict[str, Any]) -> None:
    print(f"{'':<24} {'median':>10} {'spread':>10} {'n':>4}")
    for row in report["results"]:
        print(f"{row['name']:<24} {row['value']:>10.1f} {row['spread']:>10.1f} {row['n']:>4} {row['unit']}")
    for goal in report["goals"]:
        print(f"{'met     ' if goal['met'] else 'NOT MET '} {goal['name']}: {goal['value']:.2f} ({goal['goal']})")


def main(args: list[str]) -> int:
    """Run the command; see ``kvcellar bench lookup --help``."""
    parser = argparse.ArgumentParser(prog="kvcellar bench lookup", description=__doc__)
    parser.add_argument("--blocks", type=int, default=1 << 20, help="blocks in the table (default 1048576)")
    parser.add_argument("--request", type=int, default=32_768, help="blocks of one request (default 32768)")
    parser.add_argument("--repetitions", type=int, default=15, help="repetitions of each measurement (default 15)")
    parser.add_argument("--json", action="store_true", help="JSON on standard output")
    options = parser.parse_args(args)
    if min(options.blocks, options.request, options.repetitions) < 1 or options.request > options.blocks:
        parser.error("--blocks, --request and --repetitions: at least 1, and a request no larger than the table")
    # vLLM's modules log on import; the report must stay the only thing on standard output.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    report = measure(options.blocks, options.request, options.repetitions)
    if report is None:
        return 1
    if options.json:
        print(json.dumps(report, indent=1))
    else:
        _print(report)
    return 0
