"""What torch says of a GPU, over the stub driver: streams and events are the stub's, tensors lie in host memory.

A kernel of torch's or Triton's computes when it is called, as if its stream had got there; `accesses` sees to that for
the KV cache. Everything else that torch is asked here has one fixed answer: an H100 of 80 GiB, mostly free.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import torch

from tests.vllm.stub_cuda.device import Driver

GIB = 1 << 30
CAPABILITY = (9, 0)
NAME = "NVIDIA H100 80GB HBM3"
TOTAL_BYTES, FREE_BYTES = 80 * GIB, 79 * GIB
SHARED_BYTES, MULTIPROCESSORS = 232448, 132
PROPERTIES = SimpleNamespace(
    name=NAME,
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    total_memory=TOTAL_BYTES,
    multi_processor_count=MULTIPROCESSORS,
    is_integrated=False,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    shared_memory_per_block_optin=SHARED_BYTES,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20,
    regs_per_multiprocessor=65536,
    uuid="GPU-0",
    gcnArchName="",
)


class Stream:
    """`torch.cuda.Stream`: a compute stream of the stub's, made when it is first used."""

    driver: ClassVar[Driver]
    _current: ClassVar[threading.local] = threading.local()
    _default: ClassVar["Stream | None"] = None

    def __init__(self, *_: object, **__: object) -> None:
        self.device = torch.device("cpu")
        self._handle: int | None = None

    @classmethod
    def default(cls) -> "Stream":
        if cls._default is None:
            cls._default = cls()
            cls._default._handle = 0
        return cls._default

    @classmethod
    def current(cls) -> "Stream":
        found: Stream = getattr(cls._current, "stream", None) or cls.default()
        return found

    @classmethod
    def set_current(cls, stream: "Stream | None") -> None:
        cls._current.stream = stream

    @property
    def cuda_stream(self) -> int:
        if self._handle is None:
            self._handle = self.driver.new_stream()
        return self._handle

    stream_id = native_handle = cuda_stream

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: "Event") -> None:
        self.driver.call("cuStreamWaitEvent", _pointer(self.cuda_stream), event.handle, 0)

    def wait_stream(self, stream: "Stream") -> None:
        self.wait_event(stream.record_event())

    def synchronize(self) -> None:
        self.driver.call("cuStreamSynchronize", _pointer(self.cuda_stream))

    def query(self) -> bool:
        self.synchronize()
        return True

    def __enter__(self) -> "Stream":
        self._before = Stream.current()
        Stream.set_current(self)
        return self

    def __exit__(self, *_: object) -> None:
        Stream.set_current(self._before)


class Event:
    """`torch.cuda.Event` and `torch.Event`. It takes no times."""

    def __init__(self, *_: object, **__: object) -> None:
        self.handle = Stream.driver.new_event()

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or Stream.current()
        Stream.driver.call("cuEventRecord", self.handle, _pointer(stream.cuda_stream))

    def wait(self, stream: Stream | None = None) -> None:
        (stream or Stream.current()).wait_event(self)

    def synchronize(self) -> None:
        Stream.driver.wait(self.handle)

    def query(self) -> bool:
        self.synchronize()
        return True

    def elapsed_time(self, _: "Event") -> float:
        return 1.0

    def __del__(self) -> None:
        Stream.driver.stub.cuEventDestroy_v2(self.handle)


def _pointer(handle: int) -> Any:
    import ctypes

    return ctypes.c_void_p(handle)


@contextlib.contextmanager
def _on(stream: Stream | None) -> Iterator[None]:
    before = Stream.current()
    Stream.set_current(stream or before)
    try:
        yield
    finally:
        Stream.set_current(before)


def _always(answer: Any) -> Callable[..., Any]:
    return lambda *_, **__: answer


def _synchronize(*_: object) -> None:
    Stream.current().synchronize()


def install(driver: Driver) -> None:
    """From here on torch has a GPU."""
    Stream.driver = driver
    cuda, accelerator = torch.cuda, torch.accelerator
    anywhere = {
        "current_stream": lambda *_: Stream.current(),
        "set_stream": Stream.set_current,
        "synchronize": _synchronize,
        "device_count": _always(1),
        "empty_cache": _always(None),
        "memory_stats": _always({}),
        "memory_reserved": _always(0),
        "memory_allocated": _always(0),
        "max_memory_allocated": _always(0),
        "reset_peak_memory_stats": _always(None),
    }
    for_cuda = {
        "Stream": Stream,
        "Event": Event,
        "default_stream": lambda *_: Stream.default(),
        "stream": _on,
        "init": _always(None),
        "is_available": _always(True),
        "set_device": _always(None),
        "current_device": _always(0),
        "get_device_properties": _always(PROPERTIES),
        "get_device_capability": _always(CAPABILITY),
        "get_device_name": _always(NAME),
        "mem_get_info": _always((FREE_BYTES, TOTAL_BYTES)),
        "max_memory_reserved": _always(0),
        "is_current_stream_capturing": _always(False),
        "manual_seed_all": _always(None),
    }
    for_accelerator = {
        "set_device_index": _always(None),
        "current_device_index": _always(0),
        "get_memory_info": _always((FREE_BYTES, TOTAL_BYTES)),
    }
    for module, names in ((cuda, anywhere | for_cuda), (accelerator, anywhere | for_accelerator)):
        for name, value in names.items():
            setattr(module, name, value)
    cuda.memory.get_allocator_backend = _always("none")
    cuda.nvtx.range_push = cuda.nvtx.range_pop = _always(None)
    torch.Event, torch.Stream = Event, Stream  # type: ignore[misc,assignment]
    torch.Tensor.record_stream = _always(None)
    torch.Tensor.pin_memory = lambda tensor, *_: tensor  # type: ignore[method-assign]
