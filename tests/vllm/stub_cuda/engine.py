"""vLLM on its CUDA path over the stub driver, in a process of its own: intact, then with the copier's order broken.

usage: python -m tests.vllm.stub_cuda.engine FOLDER POOL_DIR RUNNER LAYOUT MUTATION,...

Intact, the scenario that `scripts/gpu-check` runs on a GPU is run: hits of ours answer as vLLM's own do, and the stub's
checker finds nothing. Then the copier's calls or the connector's are changed: the checker has to speak.
A line of JSON for each.
"""

import os
import sys
from pathlib import Path
from typing import Any

from gpu_check_lib.cell import Cell, Scenario

from tests.vllm.stub_cuda import platform
from tests.vllm.stub_cuda.device import MUTATIONS, Driver

SEED = int(os.environ.get("KVCELLAR_SEED", "7"))
# Each request needs some blocks of 16 tokens; the crowd needs more than there are.
LENGTHS, CROWD, ANSWER_TOKENS, KV_BLOCKS = (40, 70), 6, 3, 28


def cell(pool_dir: str, runner: int, layout: str) -> Cell:
    """A tiny engine whose KV cache is too small for a crowd."""
    from gpu_check_lib.cell import BLOCK_TOKENS, SHAPES

    return Cell(
        f"V{runner} {layout}",
        Scenario.CORRECT,
        backend="TRITON_ATTN",
        runner=runner,
        layout=layout,
        lengths=LENGTHS,
        runs=1,
        answer_tokens=ANSWER_TOKENS,
        crowd=CROWD,
        kv_bytes=KV_BLOCKS * BLOCK_TOKENS * SHAPES["tiny"].token_bytes,
        dram_bytes=32 << 20,
        batched_tokens=128,
        one_process=True,
        pool_dir=pool_dir,
    )


def offload_and_reuse(engine: Any, name: str) -> None:
    """New prompts, more than there are blocks for: they are offloaded, and their blocks are given to others."""
    engine.crowd([engine.prompt(LENGTHS[1], f"{name} {at}") for at in range(CROWD)], ANSWER_TOKENS)


def offloads_under_way(engine: Any, driver: Driver, name: str) -> None:
    """The same on a lazy device: each block is still being offloaded when it is given to others.

    Nothing may be loaded meanwhile: vLLM would look for its end, and on a lazy device looking is not enough.
    """
    driver.lazy(True)
    offload_and_reuse(engine, name)
    driver.lazy(False)


def broken(engine: Any, driver: Driver, mutation: str) -> None:
    """The same with the copier's calls changed, or with the connector's idea of vLLM's stream, whatever comes of it."""
    driver.forget()
    if mutation in MUTATIONS:
        driver.mutate(MUTATIONS[mutation])
        offloads_under_way(engine, driver, mutation)
        driver.mutate(0)
        return
    from kvcellar.worker import WorkerSide

    stream, other = WorkerSide._stream, driver.new_stream()
    WorkerSide._stream = lambda _worker: other  # type: ignore[method-assign]
    # Nobody waits for that stream: on a lazy device nothing would ever end.
    offload_and_reuse(engine, mutation)
    WorkerSide._stream = stream  # type: ignore[method-assign]


def main() -> None:
    """Run it all. What vLLM writes goes to standard error."""
    folder, pool_dir, runner, layout, wanted = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), *sys.argv[4:6]
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    one = cell(pool_dir, runner, layout)
    os.environ.update(one.environment())
    os.environ["KVCELLAR_CHECK_MODELS"] = str(folder)
    platform.prepare_environment()
    driver = Driver(folder / "libcuda.so", SEED)
    platform.install(driver)
    from gpu_bundle_lib import random_weights

    from tests.vllm.stub_cuda import accesses

    accesses.install(driver)
    accesses.put_on_device(driver)
    random_weights.register()

    from gpu_check_lib import scenarios
    from gpu_check_lib.engine import Engine

    def tell(**facts: Any) -> None:
        print(scenarios.line(**facts), file=out, flush=True)

    engine = Engine(one)
    scenarios.run(engine, tell)
    offloads_under_way(engine, driver, "intact")
    engine.settle()
    count, first = driver.wrongs()
    copies = driver.calls("cuMemcpyBatchAsync", "cuMemcpyDtoHAsync_v2", "cuMemcpyHtoDAsync_v2", "cuLaunchKernel")
    fences = driver.calls("cuStreamWaitEvent")
    tell(mutation="", wrongs=count, first=first, copies=copies, waits=fences, accesses=driver.accesses)
    for mutation in filter(None, wanted.split(",")):
        broken(engine, driver, mutation)
        count, first = driver.wrongs()
        tell(mutation=mutation, wrongs=count, first=first)
    out.flush()
    # What the mutations left behind is not to be taken down with care.
    os._exit(0)


if __name__ == "__main__":
    main()
