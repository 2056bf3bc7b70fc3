"""``kvcellar bench nvme`` through Python: the native benchmark, with vLLM's own tier of files taking its turn in it.

vLLM's turn is the code of ``vllm.v1.kv_offload.tiering.fs``: its thread pool with the default number of threads, its
functions that store and load blocks, its layout of files. As many jobs are handed in as there are threads, which is
generous: vLLM hands in one a request. Its lookups and its bookkeeping are left out. Without vLLM its rows are missing.
"""

import argparse
import json
import mmap
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

from kvcellar import command

THREADS = 16  # the default of both kinds of threads in vLLM's tier
PATIENCE_S = 120.0


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class VllmFiles:
    """vLLM's tier of files below a directory, for one block size after another."""

    def __init__(self, parent: str) -> None:
        from vllm.v1.kv_offload.tiering.fs.io import batch_load_block, batch_store_block, probe_o_direct
        from vllm.v1.kv_offload.tiering.fs.thread_pool import DualQueueThreadPool

        self._load, self._store = batch_load_block, batch_store_block
        self._dir = Path(tempfile.mkdtemp(prefix="vllm-files-", dir=parent))
        self.direct = probe_o_direct(str(self._dir))
        self._pool = DualQueueThreadPool(THREADS, THREADS)
        self._memory: tuple[int, mmap.mmap, memoryview] | None = None
        self._jobs = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True)
        self._forget()
        shutil.rmtree(self._dir)

    def _forget(self) -> None:
        if self._memory is not None:
            self._memory[2].release()
            self._memory[1].close()
            self._memory = None

    def _view(self, size: int, blocks: int) -> memoryview:
        """Memory that no device can compress."""
        if self._memory is not None and self._memory[0] == size * blocks:
            return self._memory[2]
        self._forget()
        # The best memory that a system has, as the bare ring gets it.
        memory = mmap.mmap(-1, size * blocks, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        for start in range(0, size * blocks, 1 << 20):
            memory[start : start + (1 << 20)] = random.randbytes(min(1 << 20, size * blocks - start))
        self._memory = (size * blocks, memory, memoryview(memory))
        return self._memory[2]

    def _paths(self, size: int, chain: int, blocks: int) -> list[str]:
        """As vLLM names files: by the first digits of a hash that knows nothing of its neighbours."""
        digits = random.Random(chain)
        names = [f"{digits.getrandbits(256):064x}" for _ in range(blocks)]
        root = self._dir / f"{size}-{chain}"
        return [str(root / name[:3] / f"{name[3:5]}_g0" / f"{name}.bin") for name in names]

    def turn(self, size: int, blocks: int, write: bool, chain: int) -> tuple[float, float]:
        """Write a new chain of blocks, or read one back. Returns seconds and CPU seconds."""
        view = self._view(size, blocks)
        paths = self._paths(size, chain, blocks)
        move = self._store if write else self._load
        offsets = [number * size for number in range(blocks)]
        each = -(-blocks // (2 * THREADS))
        tasks = [
            partial(move, paths[start : start + each], view, offsets[start : start + each], size, self.direct)
            for start in range(0, blocks, each)
        ]
        enqueue = self._pool.enqueue_store if write else self._pool.enqueue_load
        seconds, cpu_s = self._run(enqueue, tasks)
        if not write:
            # Nobody reads it again.
            shutil.rmtree(self._dir / f"{size}-{chain}")
        return seconds, cpu_s

    def _run(self, enqueue: Callable[..., None], tasks: Sequence[Callable[[], Any]]) -> tuple[float, float]:
        cpu_s, started = _cpu_s(), time.perf_counter()
        for task in tasks:
            self._jobs += 1
            enqueue(self._jobs, 1, [task])
        self._pool.wait_idle()
        seconds, cpu_s = time.perf_counter() - started, _cpu_s() - cpu_s
        finished = self._pool.get_finished()
        if len(finished) != len(tasks) or not all(success for _, success, _ in finished):
            raise RuntimeError(f"vLLM's tier moved {sum(1 for job in finished if job[1])} of {len(tasks)} jobs")
        return seconds, cpu_s


def _with_rival(args: Sequence[str], files: VllmFiles) -> dict[str, Any] | None:
    """Run the command with vLLM's tier taking its turns. Returns the report; ``None`` where the command failed.

    The command asks for a turn with a line of JSON and is answered with one; its last line is the report.
    """
    line = command.line(["bench", "nvme", *args, "--rival-stdio"])
    told: dict[str, Any] = {}
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        for question in process.stdout or ():
            told = json.loads(question)
            if "results" in told:
                break
            seconds, cpu_s = files.turn(told["size"], told["blocks"], told["write"], told["chain"])
            print(json.dumps({"seconds": seconds, "cpu_s": cpu_s}), file=process.stdin, flush=True)
    if process.returncode or "results" not in told:
        return None
    told["disk"]["vllm_fs"] = {"engine": "threads", "threads": 2 * THREADS, "direct": files.direct}
    return told


def _print(report: dict[str, Any]) -> None:
    print(f"{'':<32} {'median':>10} {'spread':>10} {'n':>4}")
    for row in report["results"]:
        print(f"{row['name']:<32} {row['value']:>10.4f} {row['spread']:>10.4f} {row['n']:>4} {row['unit']}")
    for goal in report["goals"]:
        print(f"{'met     ' if goal['met'] else 'NOT MET '} {goal['name']}: {goal['value']:.2f} ({goal['goal']})")


def main(args: list[str]) -> int:
    """Run the command; see ``kvcellar bench nvme --help``. Returns its exit code."""
    known, _ = _rivals_options().parse_known_args(args)
    if known.help or known.dir is None or known.reopen is not None:
        # Nothing is measured, or vLLM's tier has nothing to open.
        return command.run(["bench", "nvme", *args])
    # vLLM's modules log on import; the report must stay the only thing on standard output.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        files = VllmFiles(known.dir)
    except ImportError:
        return command.run(["bench", "nvme", *args])
    except OSError as error:
        print(f"kvcellar: {known.dir}: {error.strerror}. Name a directory that you may write to", file=sys.stderr)
        return 1
    with files:
        report = _with_rival([argument for argument in args if argument != "--json"], files)
    if report is None:
        return 1
    if known.json:
        print(json.dumps(report, indent=1))
    else:
        _print(report)
    return 0


def _rivals_options() -> argparse.ArgumentParser:
    """What this side has to know of the command line; the command itself checks it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--dir")
    parser.add_argument("--reopen")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("-h", "--help", action="store_true")
    return parser
