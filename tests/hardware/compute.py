"""The stream on which a model computes, on a device that can be put to sleep: a hook that returns then did not wait.

Over host memory nothing sleeps: work is over when its call returns, and whether a hook waits cannot be seen.
"""

import os
from functools import cache
from types import TracebackType

import torch

DEVICE = torch.device(os.environ.get("KVCELLAR_HARDWARE_DEVICE", "cuda:0"))
# Longer than the host takes for a few steps, by far.
NAP_MS = 50.0
CROWD_BYTES = 32 << 20
PROBE_CYCLES = 10_000_000


def why_skipped() -> str | None:
    """Why nothing of this can run here."""
    if DEVICE.type != "cuda":
        return None
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    if torch.version.hip is not None:
        return "the GPU is not NVIDIA's"
    return None


@cache
def cycles_per_ms() -> float:
    """Of the clock that `torch.cuda._sleep` counts.

    The fastest of several looks: an idle device's clock is slow at first, and no nap may be shorter than it says.
    """
    fastest = 0.0
    for _ in range(20):
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        torch.cuda._sleep(PROBE_CYCLES)
        after.record()
        after.synchronize()
        fastest = max(fastest, PROBE_CYCLES / before.elapsed_time(after))
    return fastest


class Crowd:
    """Work of others, on streams beside the model's, that copies have to share the device with."""

    def __init__(self) -> None:
        self.computing, self.moving = torch.cuda.Stream(DEVICE), torch.cuda.Stream(DEVICE)
        self.factor = torch.rand(4096, 4096, device=DEVICE, dtype=torch.bfloat16)
        self.product = torch.empty_like(self.factor)
        self.bytes = torch.zeros(CROWD_BYTES, device=DEVICE, dtype=torch.uint8)
        self.host = torch.empty(CROWD_BYTES, dtype=torch.uint8, pin_memory=True)

    def come(self, start: torch.cuda.Event) -> None:
        """Some ms of work each way, from an event on."""
        self.computing.wait_event(start)
        with torch.cuda.stream(self.computing):
            for _ in range(8):
                torch.mm(self.factor, self.factor, out=self.product)
        self.moving.wait_event(start)
        with torch.cuda.stream(self.moving):
            for _ in range(2):
                self.host.copy_(self.bytes, non_blocking=True)
                self.bytes.copy_(self.host, non_blocking=True)


@cache
def streams() -> tuple[torch.cuda.Stream, Crowd]:
    """The model's stream, and others. Taken once: torch gives out 32 streams in turn, and two might be the same.

    What a first use sets up is set up here: kernels are loaded then, which may wait for the device.
    """
    stream, crowd, start = torch.cuda.Stream(DEVICE), Crowd(), torch.cuda.Event()
    cycles_per_ms()
    torch.cuda.synchronize(DEVICE)
    start.record(stream)
    crowd.come(start)
    torch.cuda.synchronize(DEVICE)
    return stream, crowd


class Compute:
    """As a context manager: torch's current stream is the model's, and at the end the device is waited for."""

    def __init__(self, on_default_stream: bool = False) -> None:
        self.on_gpu = DEVICE.type == "cuda"
        self._napping = False
        if self.on_gpu:
            stream, self._crowd = streams()
            self.stream = torch.cuda.default_stream(DEVICE) if on_default_stream else stream
            self._context = torch.cuda.stream(self.stream)
            self._awake = torch.cuda.Event()

    def __enter__(self) -> "Compute":
        if self.on_gpu:
            self._context.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.on_gpu:
            self._context.__exit__(kind, error, trace)
            self.wait()

    def doze(self, ms: float) -> None:
        """What the stream is given from here on starts so much later."""
        if self.on_gpu:
            with torch.cuda.stream(self.stream):
                torch.cuda._sleep(int(ms * cycles_per_ms()))

    def sleep(self) -> None:
        """What the stream is given from here on starts after a nap. Then others come, too: copies take their time.

        Launches must not wait for the nap either. So only what ran before may be launched until it is over (a kernel is
        loaded at its first launch), at most some hundred times (a stream's queue holds about a thousand launches), and
        nothing may be uploaded from ordinary memory.
        """
        if self.on_gpu:
            self.doze(NAP_MS)
            self._awake.record(self.stream)
            self._crowd.come(self._awake)
            self._napping = True

    def wait(self) -> None:
        """All work of all streams is over."""
        if self.on_gpu:
            self._napping = False
            torch.cuda.synchronize(DEVICE)

    def asleep(self) -> bool:
        """The device has begun nothing of what the stream was given since `sleep`. Over host memory never true."""
        return self._napping and not self._awake.query()

    def must_sleep(self, what: str) -> None:
        """Fails if the nap that was begun is over: what has just returned waited for the device."""
        if self._napping and not self.asleep():
            raise AssertionError(f"{what} returned after the device had slept {NAP_MS:.0f} ms: it waited for it")
