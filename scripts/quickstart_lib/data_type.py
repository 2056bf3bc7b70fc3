"""Which data type the small model is computed in on this CPU. The tests use it, too: it imports no neighbour.

bfloat16 where the processor multiplies it. Elsewhere (AVX2, AVX-512 without bf16) every product is widened by hand,
and a model runs in bfloat16 at a quarter of its speed in float32.
"""

import re
from dataclasses import dataclass
from pathlib import Path

CPU_FACTS = Path("/proc/cpuinfo")
# x86's names, then Arm's.
FAST_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16", "svebf16"})
FLAGS_LINE = re.compile(r"^(?:flags|Features)\s*:(.*)$", re.MULTILINE)


@dataclass(frozen=True)
class DataType:
    """A data type and why it was taken."""

    name: str
    reason: str

    @property
    def element_bytes(self) -> int:
        """Bytes of one number, in weights and in the KV cache alike."""
        return BYTES[self.name]

    def sentence(self) -> str:
        """For people."""
        return f"the model is computed in {self.name}: {self.reason}"

    def scaled(self, bfloat16_bytes: int) -> int:
        """A size that holds as many tokens in this type as `bfloat16_bytes` do in bfloat16."""
        return bfloat16_bytes * self.element_bytes // BYTES["bfloat16"]


BYTES = {"bfloat16": 2, "float32": 4}


def choose(wish: str | None, cpu_facts: str) -> DataType:
    """`wish` if there is one, else what this processor is fast in.

    Args:
        wish: a name in `BYTES`, or None.
        cpu_facts: the text of /proc/cpuinfo.

    Raises:
        ValueError: `wish` is no such name.
    """
    if wish is not None:
        if wish not in BYTES:
            raise ValueError(f"{wish!r} is no data type of the small model: write {' or '.join(BYTES)}")
        return DataType(wish, "as asked for")
    found = FLAGS_LINE.search(cpu_facts)
    fast = sorted(FAST_FLAGS.intersection(found.group(1).split())) if found else []
    if fast:
        return DataType("bfloat16", f"this processor multiplies it: {', '.join(fast)}")
    return DataType("float32", "this processor has no instructions for bfloat16, and would be slow in it")


def of_this_machine(wish: str | None = None) -> DataType:
    """The choice for the processor that we run on; where Linux tells nothing of it, float32.

    Raises:
        ValueError: as `choose`.
    """
    return choose(wish, CPU_FACTS.read_text() if CPU_FACTS.is_file() else "")
