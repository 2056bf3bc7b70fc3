"""The platforms that wheels are made for."""

import platform
from dataclasses import dataclass

# What the oldest supported systems have: glibc 2.28, as vLLM's own wheels need it at least.
GLIBC = (2, 28)


@dataclass(frozen=True)
class Target:
    """One platform.

    Attributes:
        machine: as `uname -m` and wheels name it.
        elf: the machine's number in an ELF header.
    """

    machine: str
    elf: int

    @property
    def triple(self) -> str:
        """As Rust names it."""
        return f"{self.machine}-unknown-linux-gnu"

    @property
    def manylinux(self) -> str:
        """As wheels name it, without the machine."""
        return f"manylinux_{GLIBC[0]}_{GLIBC[1]}"

    @property
    def is_here(self) -> bool:
        """This machine can run it."""
        return platform.machine() == self.machine


TARGETS = {target.machine: target for target in (Target("x86_64", 62), Target("aarch64", 183))}
