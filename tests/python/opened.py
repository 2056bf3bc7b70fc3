"""Opens the tiers of a configuration as an engine does, says how as JSON, and then talks as vLLM's processes do.

`python -m tests.python.opened CONFIG`: a program of its own, so that it can be run where the system gives less.
"""

import json
import shutil
import sys
from multiprocessing import shared_memory

from kvcellar._native import Config, TierEngine

from tests.python.test_native import GROUPING

BLOCK_BYTES = 256 << 10
# The ring of messages between vLLM's EngineCore and its worker: made whole, its pages come as it
# goes round.
CHUNKS, CHUNK_BYTES, MESSAGE_BYTES = 10, 24 << 20, 200_000


def go_round() -> None:
    """A message in each chunk of a ring."""
    ring = shared_memory.SharedMemory(create=True, size=CHUNKS * CHUNK_BYTES)
    try:
        for chunk in range(CHUNKS):
            begin = chunk * CHUNK_BYTES
            ring.buf[begin : begin + MESSAGE_BYTES] = b"x" * MESSAGE_BYTES
    finally:
        ring.close()
        ring.unlink()


def main() -> None:
    """Opens, goes round, says, and lets go."""
    config = Config.parse(sys.argv[1])
    early = config.check_machine()
    engine = TierEngine(config, GROUPING)
    ranks = json.dumps([{"block_bytes": [BLOCK_BYTES], "replica_of": [None]}])
    report = engine.open_pool(ranks, '{"model": "test"}', True, lambda done, total: None)
    disk = report.disk
    said = {"early": early, "bytes": report.bytes, "bound": report.bound, "warnings": report.warnings}
    said["huge"] = report.huge_bytes
    if disk is not None:
        said["disk"] = {"engine": disk.engine, "blocks": disk.extents_max, "warnings": disk.warnings}
    said["queue"] = {"bytes": CHUNKS * CHUNK_BYTES, "free": shutil.disk_usage("/dev/shm").free}
    print(json.dumps(said), flush=True)
    go_round()
    engine.close()


if __name__ == "__main__":
    main()
