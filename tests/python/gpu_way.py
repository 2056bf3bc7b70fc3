"""A block's whole way between a stub GPU and the pool, through the native module.

A program of its own, for a process loads its driver once. Usage: gpu_way.py STUB_LIBRARY POOL_DIR; `test_gpu_way.py`
runs it.
"""

import ctypes
import hashlib
import json
import sys
import time

from kvcellar import nvrtc
from kvcellar._native import Config, CopyWorker, TierEngine

PAGE, BLOCKS, TOKENS = 4096, 8, 16


def main(library: str, pool_dir: str) -> None:
    """Store three blocks after a step, load them into others, compare, and print what the copier has to say."""
    # The library's name makes the loader give it to whoever asks for the driver's from here on.
    stub = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    stub.stub_reset(ctypes.c_uint64(7))
    stub.stub_compute.restype = ctypes.c_void_p
    memory = ctypes.create_string_buffer(BLOCKS * PAGE + 16)
    start = (ctypes.addressof(memory) + 15) // 16 * 16
    stub.stub_adopt(ctypes.c_size_t(start), ctypes.c_size_t(BLOCKS * PAGE))
    stream = stub.stub_compute()

    config = Config.parse(json.dumps({"dram_size": "1MiB", "pool_dir": pool_dir}))
    group = {"kind": "full", "kind_name": "full_attention", "block_tokens": TOKENS, "eagle": False}
    engine = TierEngine(config, json.dumps({"groups": [group], "hash_tokens": TOKENS, "hit_tokens": TOKENS}))
    view = {"address": start, "stride_bytes": PAGE, "page_bytes": PAGE, "pages_per_block": 1, "pages": BLOCKS}
    worker = CopyWorker(config, 0, json.dumps([[view]]), 0, nvrtc.libraries())
    ranks = json.dumps([{"block_bytes": worker.block_bytes, "replica_of": [None] * len(worker.block_bytes)}])
    engine.open_pool(ranks, "{}", True, lambda _done, _total: None)
    ticket = engine.ticket()
    assert ticket is not None
    worker.attach(ticket)

    hashes = [hashlib.sha256(bytes([at])).digest() for at in range(3)]
    engine.add_request("a", None, "")
    engine.lookup("a", 49, 0, hashes)
    engine.admit("a", 0, [])
    plan, _ = engine.step([("a", [], 0, list(range(48)), [(0, [1, 2, 3], [])])], [])
    worker.begin_step(plan, stream)
    worker.start_loads(stream)
    for block in (1, 2, 3):
        where, size = (ctypes.c_size_t * 1)(start + block * PAGE), (ctypes.c_size_t * 1)(PAGE)
        stub.stub_forward(ctypes.c_void_p(stream), where, size, ctypes.c_size_t(1), 40 + block, 1)
    worker.finish_step(stream)
    while dict(engine.gauges())["filling_slots"]:
        engine.pending_work()
        time.sleep(0.001)

    engine.add_request("b", None, "")
    assert engine.lookup("b", 49, 0, hashes) == 48
    engine.admit("b", 48, [[5, 6, 7]])
    worker.begin_step(engine.step([], [])[0], stream)
    worker.start_loads(stream)
    finished: list[str] = []
    while not finished:
        finished, failed = worker.take_results()
        assert not failed
    for source in (1, 2, 3):
        assert ctypes.string_at(start + (source + 4) * PAGE, PAGE) == bytes([40 + source]) * PAGE
    print("\n".join(worker.take_notes()))
    print(f"{stub.stub_calls(b'cuLaunchKernel')} kernels")
    worker.release(0.0)
    engine.close()
    first = ctypes.create_string_buffer(256)
    assert stub.stub_wrongs(first, ctypes.c_size_t(256)) == 0, first.value


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
