"""Runs a command without io_uring, or with little locked memory.

`python confined.py no-ring|little-memlock COMMAND...`

The limits hold for the command and everything it starts. They cannot be lifted again, hence a process of its own.
"""

import ctypes
import os
import resource
import struct
import sys

IO_URING_SETUP = 425  # the same on all architectures that have it
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, PR_CAPBSET_DROP = 38, 22, 24
SECCOMP_MODE_FILTER = 2
CAP_IPC_LOCK = 14
EPERM = 1
MEMLOCK_BYTES = 8 << 20


class _Program(ctypes.Structure):
    """The kernel's ``struct sock_fprog``."""

    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))


def _prctl(option: int, *args: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, *args, *([0] * (4 - len(args)))) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option})")


def refuse_ring() -> None:
    """io_uring_setup answers EPERM from now on, as under the usual containers' profiles."""
    load_number, jump_if_equal, give_back = 0x20, 0x15, 0x06
    steps = [
        (load_number, 0, 0, 0),
        (jump_if_equal, 0, 1, IO_URING_SETUP),
        (give_back, 0, 0, 0x00050000 | EPERM),
        (give_back, 0, 0, 0x7FFF0000),
    ]
    code = b"".join(struct.pack("HBBI", *step) for step in steps)
    program = _Program(len(steps), code)
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    _prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program))


def limit_memlock() -> None:
    """8 MiB of locked memory; the capability that goes around the limit is lost with the next program."""
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (MEMLOCK_BYTES, MEMLOCK_BYTES))
    if os.geteuid() == 0:
        _prctl(PR_CAPBSET_DROP, CAP_IPC_LOCK)


if __name__ == "__main__":
    {"no-ring": refuse_ring, "little-memlock": limit_memlock}[sys.argv[1]]()
    os.execvp(sys.argv[2], sys.argv[2:])
