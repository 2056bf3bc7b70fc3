"""Whether lossless compression would pay: KV of the real model over text, as `kvcellar bench compression` sees it.

python -m tests.vllm.compression reports/bench-compression.json
"""

import subprocess
import sys
from pathlib import Path

from tests.vllm.engines import open_engine
from tests.vllm.places import ROOT, real_model, temporary_disk_dir, temporary_pool_dir
from tests.vllm.sizes import kv_mib

TEXTS = 12
TOKENS = 900


def prompts() -> list[list[int]]:
    """The quickstart's text: random token ids would make KV that no conversation has."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from quickstart_lib.conversations import Writer

    writer = Writer(real_model(), seed=7)
    return [writer.opening(f"compression-{index}", TOKENS) for index in range(TEXTS)]


def main() -> int:
    """Fills a store, stops the engine, and measures what lies there."""
    report = Path(sys.argv[1])
    with temporary_disk_dir() as disk, temporary_pool_dir() as pool:
        cellar = {"dram_size": kv_mib(512), "nvme_dir": str(disk), "nvme_size": kv_mib(1024), "write_through": True}
        with open_engine(pool, pool, cellar=cellar) as engine:
            for tokens in prompts():
                engine.complete(tokens, 4)
            engine.settle()
        done = subprocess.run(
            [sys.executable, "-m", "kvcellar", "bench", "compression", str(disk), "--json"],
            capture_output=True,
            text=True,
            check=False,
        )
    sys.stderr.write(done.stderr)
    # vLLM logs to standard output too: the report goes to a file of its own.
    if done.returncode == 0:
        report.write_text(done.stdout)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
