"""How fast this machine multiplies in the engines' data type: which the pace of all deadlines follows."""

import functools
import subprocess
import sys
import time

from tests.deadlines import PACE
from tests.vllm.places import ROOT
from tests.vllm.sizes import DATA_TYPE

# One layer's widest product of the small model for a chunk of 256 tokens.
TOKENS, HIDDEN, INNER = 256, 576, 1536
# What one takes on one core of a good machine in float32. In bfloat16 it is faster there, and needs
# no patience.
GOOD_S = 0.009
PROCESS_GOOD_S = 10.0
PRODUCTS_MAX = 40
MEASURE_S = 2.0


@functools.cache
def learn() -> None:
    """Measures once a session, and lets the pace of deadlines know.

    In a process of its own: an engine forked from one that has used torch's threads may hang. How long that process
    takes as a whole, which is mostly the import of torch, tells what else this machine has to do, and what a start of
    an engine will take.
    """
    command = [sys.executable, "-m", "tests.vllm.speed"]
    begin = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    PACE.see(time.monotonic() - begin, PROCESS_GOOD_S)
    PACE.see(float(done.stdout), GOOD_S)


def measure() -> float:
    """Seconds that one product takes on one core: the fastest of several, so that a pause does not count."""
    import torch

    torch.set_num_threads(1)
    kind = getattr(torch, DATA_TYPE.name)
    tokens, weights = torch.rand(TOKENS, HIDDEN, dtype=kind), torch.rand(HIDDEN, INNER, dtype=kind)
    taken: list[float] = []
    while len(taken) < PRODUCTS_MAX and sum(taken) < MEASURE_S:
        begin = time.perf_counter()
        torch.mm(tokens, weights)
        taken.append(time.perf_counter() - begin)
    return min(taken)


if __name__ == "__main__":
    print(measure())
