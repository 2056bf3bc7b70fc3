"""Runs a command as in a container: with less than the machine has, and without some of its calls.

`python confined.py LIMIT[,LIMIT...] COMMAND...`, each of them one of `LIMITS`.

The limits hold for the command and everything it starts. They cannot be lifted again, hence a process of its own.
"""

import ctypes
import os
import resource
import struct
import sys
from collections.abc import Callable
from pathlib import Path

IO_URING_SETUP = 425  # the same on all architectures that have it
MADVISE = {"x86_64": 28, "aarch64": 233}
MADV_POPULATE_WRITE = 23
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, PR_CAPBSET_DROP = 38, 22, 24
SECCOMP_MODE_FILTER = 2
CAP_IPC_LOCK = 14
EPERM, EINVAL = 1, 22
CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 0x40000
MEMLOCK_BYTES = 8 << 20
# What a container gets that nobody gave another size, and what some are given.
SHARED_BYTES, MORE_SHARED_BYTES = 64 << 20, 512 << 20
# What a made-up control group leaves of its limit.
GROUP_BYTES, GROUP_ROOM_BYTES = 4 << 30, 40 << 20

# Where the kernel's ``struct seccomp_data`` has the call's number, and the low half of its third
# argument.
NUMBER_AT, THIRD_AT = 0, 32
LOAD, JUMP_IF_EQUAL, GIVE_BACK = 0x20, 0x15, 0x06
REFUSE, ALLOW = 0x00050000, 0x7FFF0000


class _Program(ctypes.Structure):
    """The kernel's ``struct sock_fprog``."""

    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))


def _libc(name: str, *args: object) -> None:
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    if function(*args) != 0:
        raise OSError(ctypes.get_errno(), f"{name}{args}")


def _prctl(option: int, *args: object) -> None:
    _libc("prctl", option, *args, *([0] * (4 - len(args))))


def _filter(*steps: tuple[int, int, int, int]) -> None:
    code = b"".join(struct.pack("HBBI", *step) for step in steps)
    program = _Program(len(steps), code)
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    _prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program))


def refuse_ring() -> None:
    """io_uring_setup answers EPERM from now on, as under the usual containers' profiles."""
    _filter(
        (LOAD, 0, 0, NUMBER_AT),
        (JUMP_IF_EQUAL, 0, 1, IO_URING_SETUP),
        (GIVE_BACK, 0, 0, REFUSE | EPERM),
        (GIVE_BACK, 0, 0, ALLOW),
    )


def refuse_populating(errno: int) -> None:
    """Madvise does not know how to populate a mapping: EINVAL as on kernels before 5.14, EPERM as some profiles."""
    _filter(
        (LOAD, 0, 0, NUMBER_AT),
        (JUMP_IF_EQUAL, 0, 3, MADVISE[os.uname().machine]),
        (LOAD, 0, 0, THIRD_AT),
        (JUMP_IF_EQUAL, 0, 1, MADV_POPULATE_WRITE),
        (GIVE_BACK, 0, 0, REFUSE | errno),
        (GIVE_BACK, 0, 0, ALLOW),
    )


def limit_memlock() -> None:
    """8 MiB of locked memory; the capability that goes around the limit is lost with the next program."""
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (MEMLOCK_BYTES, MEMLOCK_BYTES))
    if os.geteuid() == 0:
        _prctl(PR_CAPBSET_DROP, CAP_IPC_LOCK)


def _mount_memory(where: str, size: int, more: str = "") -> None:
    """A tmpfs that only this process and what it starts see. Root only."""
    _libc("unshare", CLONE_NEWNS)
    _libc("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    _libc("mount", b"tmpfs", where.encode(), b"tmpfs", 0, f"size={size}{more}".encode())


def limit_shared_memory(size: int) -> None:
    """/dev/shm is one of our own, of this size."""
    _mount_memory("/dev/shm", size)


def show_group() -> None:
    """The files of a control group say that little memory is left. Nobody enforces it."""
    _mount_memory("/sys/fs/cgroup", 1 << 20)
    files = {"memory.max": GROUP_BYTES, "memory.current": GROUP_BYTES - GROUP_ROOM_BYTES}
    for name, value in files.items():
        Path("/sys/fs/cgroup", name).write_text(f"{value}\n")


LIMITS: dict[str, Callable[[], None]] = {
    "no-ring": refuse_ring,
    "no-populate-einval": lambda: refuse_populating(EINVAL),
    "no-populate-eperm": lambda: refuse_populating(EPERM),
    "little-memlock": limit_memlock,
    "small-shm": lambda: limit_shared_memory(SHARED_BYTES),
    "more-shm": lambda: limit_shared_memory(MORE_SHARED_BYTES),
    "huge-shm": lambda: _mount_memory("/dev/shm", MORE_SHARED_BYTES, ",huge=advise"),
    "small-group": show_group,
}


if __name__ == "__main__":
    for limit in sys.argv[1].split(","):
        LIMITS[limit]()
    os.execvp(sys.argv[2], sys.argv[2:])
