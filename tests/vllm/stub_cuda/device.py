"""The stub driver as a process sees it: built with the system's C compiler, loaded in the driver's place."""

import ctypes
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

SOURCES = Path(__file__).parents[2] / "cuda" / "stub"
_FLAGS = ["-std=c11", "-D_GNU_SOURCE", "-O1", "-shared", "-fPIC", "-pthread", "-Wl,-soname,libcuda.so,-Bsymbolic"]
# What the stub can do to the copier's calls, as `Mutation` in tests/cuda/stub.rs.
MUTATIONS = {"CopiesWaitForNothing": 1, "EventsAreOverAtOnce": 2, "ComputeWaitsForNothing": 3}
# What a test can do to the connector: it names a stream on which vLLM does not compute.
OTHER_STREAM = "OtherStream"
# An event that takes no times: the only kind that the stub lets pass.
_PLAIN = 2
_local = threading.local()


def build(folder: Path) -> Path:
    """The stub's library."""
    library = folder / "libcuda.so"
    subprocess.run(["cc", *_FLAGS, *map(str, sorted(SOURCES.glob("*.c"))), "-o", str(library)], check=True)
    return library


class Driver:
    """The loaded stub.

    Attributes:
        accesses: how often the checker was told of a kernel's.
    """

    def __init__(self, library: Path, seed: int) -> None:
        # The library's name makes the loader give it to whoever asks for the driver's from here on.
        self.accesses = 0
        self.stub = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        self.stub.stub_compute.restype = ctypes.c_void_p
        self.stub.stub_reset(ctypes.c_uint64(seed))
        self._context = ctypes.c_void_p()
        self._answer("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), 0)

    def _answer(self, name: str, *arguments: object) -> None:
        code = getattr(self.stub, name)(*arguments)
        if code:
            raise RuntimeError(f"{name} answered {code}")

    def call(self, name: str, *arguments: object) -> None:
        """A call of the driver's, in the device's context, as torch makes it."""
        if not getattr(_local, "entered", False):
            self._answer("cuCtxPushCurrent_v2", self._context)
            _local.entered = True
        self._answer(name, *arguments)

    def new_stream(self) -> int:
        """A stream of the model's."""
        handle = self.stub.stub_compute()
        if not handle:
            raise RuntimeError("the stub has no more streams")
        return int(handle)

    def new_event(self) -> ctypes.c_void_p:
        """An event that nobody has recorded."""
        event = ctypes.c_void_p()
        self.call("cuEventCreate", ctypes.byref(event), _PLAIN)
        return event

    def wait(self, event: ctypes.c_void_p) -> None:
        """The host waits for an event, and knows of all that was before it from then on."""
        if not self.stub.stub_wait(event):
            raise RuntimeError("streams wait for each other")

    def reach(self, stream: int) -> None:
        """Everything that a stream was told to wait for is over; the host does not know."""
        if not self.stub.stub_reach(ctypes.c_void_p(stream)):
            raise RuntimeError("streams wait for each other")

    def access(self, stream: int, ranges: Sequence[tuple[int, int]], *, writes: bool) -> None:
        """A kernel of this stream has read or written memory: addresses and lengths in bytes."""
        self.accesses += 1
        starts = (ctypes.c_size_t * len(ranges))(*(start for start, _ in ranges))
        lens = (ctypes.c_size_t * len(ranges))(*(length for _, length in ranges))
        self.stub.stub_access(ctypes.c_void_p(stream), starts, lens, ctypes.c_size_t(len(ranges)), int(writes))

    def adopt(self, start: int, length: int) -> None:
        """This memory counts as the device's."""
        self.stub.stub_adopt(ctypes.c_size_t(start), ctypes.c_size_t(length))

    def mutate(self, mutation: int) -> None:
        """What the stub does to the copier's calls from here on: of `MUTATIONS`, or 0 for none."""
        self.stub.stub_set(b"mutation", ctypes.c_uint64(mutation))

    def lazy(self, lazy: bool) -> None:
        """Copies run only when somebody waits for them: they are still under way when their blocks are given away."""
        self.stub.stub_set(b"lazy", ctypes.c_uint64(lazy))

    def forget(self) -> None:
        """The device has done all it was given, and what the checker found counts no more."""
        self.stub.stub_forget()

    def wrongs(self) -> tuple[int, str]:
        """What the checker found: how much, and the first of it."""
        first = ctypes.create_string_buffer(256)
        count = self.stub.stub_wrongs(first, ctypes.c_size_t(len(first)))
        return int(count), first.value.decode()

    def calls(self, *names: str) -> int:
        """How often these functions were called, together."""
        return sum(int(self.stub.stub_calls(name.encode())) for name in names)
