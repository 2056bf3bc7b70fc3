"""Starts the engine of one cell and asks it. A line of JSON for each thing found; all else goes to standard error.

usage: python -m gpu_check_lib.serve CELL   (JSON, as `cell.Cell` writes it)
"""

import faulthandler
import os
import sys
from typing import Any

from gpu_check_lib.cell import Cell


def main() -> None:
    """Do it. The environment is set before anything of vLLM or torch is imported."""
    faulthandler.enable()
    cell = Cell.of(sys.argv[1])
    os.environ.update(cell.environment())
    # vLLM and its processes log to standard output.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    from gpu_check_lib import scenarios

    def tell(**facts: Any) -> None:
        print(scenarios.line(**facts), file=out, flush=True)

    scenarios.told_by(cell, tell)


if __name__ == "__main__":
    main()
