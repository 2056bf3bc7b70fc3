"""The tier engine and a copy worker over torch tensors, in one process, as vLLM drives them; without vLLM."""

import hashlib
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from kvcellar import views
from kvcellar._native import Config, CopyWorker, TierEngine

BLOCK_TOKENS = 16
LAYOUTS = ("BLHNC", "LBHNC", "LBNHC", "BLNHC")
# It only turns a hang into a failure; a test as a whole has its own limit.
PATIENCE_S = 300
POLL_S = 0.0002


@dataclass(frozen=True)
class Shape:
    """A KV cache's dimensions. A page in one layer has `heads * tokens * width` bytes; `ratio` pages make a block."""

    layout: str
    layers: int
    blocks: int
    heads: int
    tokens: int
    width: int
    ratio: int = 1

    @property
    def page_bytes(self) -> int:
        return self.heads * self.tokens * self.width

    @property
    def block_bytes(self) -> int:
        return self.layers * self.ratio * self.page_bytes


class Cache:
    """One flat allocation, and views of it: each layer's [kernel blocks, heads, tokens, width], and all layers' in one.

    What changes or reads blocks is one launch on the current stream, however many there are, and is not waited for.
    """

    def __init__(self, shape: Shape, device: torch.device, seed: int) -> None:
        self.shape = shape
        pages = shape.blocks * shape.ratio
        self.memory = torch.zeros(shape.layers * pages * shape.page_bytes, dtype=torch.uint8, device=device)
        # Strides of heads and tokens, then of pages and layers.
        inner = (
            (shape.tokens * shape.width, shape.width)
            if shape.layout.endswith("HNC")
            else (shape.width, shape.heads * shape.width)
        )
        by_block = shape.layout.startswith("B")
        page_stride = shape.page_bytes * (shape.layers if by_block else 1)
        layer_stride = shape.page_bytes * (1 if by_block else pages)
        self.all_layers = self.memory.as_strided(
            (shape.layers, pages, shape.heads, shape.tokens, shape.width), (layer_stride, page_stride, *inner, 1)
        )
        self.layers = list(self.all_layers.unbind(0))
        self._random = torch.Generator(device).manual_seed(seed)

    def views(self) -> str:
        """What the connector would register."""
        layers = [views.layer_view(str(at), layer, self.shape.blocks) for at, layer in enumerate(self.layers)]
        return views.native([layers])

    def pages(self, blocks: list[int]) -> torch.Tensor:
        """The blocks' pages, as `write` and `read` take them. Their upload waits for the stream."""
        ratio = self.shape.ratio
        pages = [block * ratio + page for block in blocks for page in range(ratio)]
        return torch.tensor(pages, device=self.memory.device)

    def content(self, blocks: int) -> torch.Tensor:
        """Random bytes for so many blocks, in all layers."""
        layers, _, *inner = self.all_layers.shape
        shape = (layers, blocks * self.shape.ratio, *inner)
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=self.memory.device, generator=self._random)

    def write(self, pages: torch.Tensor, content: torch.Tensor) -> None:
        """The pages' bytes are these from here on."""
        self.all_layers.index_copy_(1, pages, content)

    def read(self, pages: torch.Tensor, into: torch.Tensor) -> None:
        """The pages' bytes as they are now."""
        torch.index_select(self.all_layers, 1, pages, out=into)

    def differing(self, found: torch.Tensor, wanted: torch.Tensor) -> list[int]:
        """Which blocks of two contents differ, by their place there. Waits for them."""
        if torch.equal(found, wanted):
            return []
        unequal = (found != wanted).movedim(1, 0).reshape(found.shape[1] // self.shape.ratio, -1).any(1)
        places: list[int] = unequal.nonzero().flatten().tolist()
        return places


class Rig:
    """An engine and a worker over one cache. As a context manager it lets go at the end.

    Attributes:
        returned: called when a hook of the worker has returned, with its name and how long it took.
    """

    def __init__(self, cache: Cache, slots: int, pool_dir: Path, nvrtc: list[str]) -> None:
        self.cache = cache
        self.returned: Callable[[str], None] = lambda _hook: None
        slot_bytes = cache.shape.block_bytes + (64 << 10)
        settings = {"dram_size": slots * slot_bytes + (4 << 20), "pool_dir": str(pool_dir), "keep_pool": False}
        config = Config.parse(json.dumps(settings))
        group = {"kind": "full", "kind_name": "full_attention", "block_tokens": BLOCK_TOKENS, "eagle": False}
        grouping = {"groups": [group], "hash_tokens": BLOCK_TOKENS, "hit_tokens": BLOCK_TOKENS}
        device = cache.memory.device
        self.engine = TierEngine(config, json.dumps(grouping))
        self.worker = CopyWorker(
            config,
            0,
            cache.views(),
            device.index if device.type == "cuda" else None,
            nvrtc if device.type == "cuda" else [],
        )
        ranks = [{"block_bytes": self.worker.block_bytes, "replica_of": [None] * len(self.worker.block_bytes)}]
        self.engine.open_pool(json.dumps(ranks), '{"model": "hardware"}', True, lambda _done, _total: None)
        ticket = self.engine.ticket()
        if ticket is None:
            raise RuntimeError("the engine gave no ticket")
        self.worker.attach(ticket)
        self._notes: list[str] = []
        self._requests = 0

    def __enter__(self) -> "Rig":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            print(f"the copier says: {self.notes()}", file=sys.stderr, flush=True)
        self.worker.release(0.0)
        self.engine.close()

    def notes(self) -> list[str]:
        """What the copier has told so far."""
        self._notes += self.worker.take_notes()
        return list(self._notes)

    def _stream(self) -> int | None:
        device = self.cache.memory.device
        return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None

    def _hook(self, name: str, call: Callable[[], None]) -> None:
        started = time.perf_counter()
        call()
        self.returned(f"{name} ({(time.perf_counter() - started) * 1e3:.1f} ms)")

    def _step(self, plan: bytes, forward: Callable[[], None]) -> None:
        self._hook("begin_step", lambda: self.worker.begin_step(plan, self._stream()))
        self._hook("start_loads", lambda: self.worker.start_loads(self._stream()))
        forward()
        self._hook("finish_step", lambda: self.worker.finish_step(self._stream()))

    def hashes(self, name: str, count: int) -> list[bytes]:
        """Names for as many blocks."""
        return [hashlib.sha256(f"{name} {at}".encode()).digest() for at in range(count)]

    def store(self, name: str, blocks: list[int], forward: Callable[[], None], reallocated: bool = False) -> None:
        """One step that computes these blocks by `forward` and offloads them. Waits for nothing.

        Args:
            name: of the content, to load it by.
            blocks: vLLM's.
            forward: writes them.
            reallocated: they were somebody else's until now.
        """
        tokens = list(range(len(blocks) * BLOCK_TOKENS))
        self.engine.add_request(name, None, "")
        self.engine.lookup(name, len(tokens) + 1, 0, self.hashes(name, len(blocks)))
        self.engine.admit(name, 0, [])
        plan, _ = self.engine.step([(name, [], 0, tokens, [(0, blocks, [])])], [blocks] if reallocated else [])
        self._step(plan, forward)
        self.engine.finish(name, len(tokens), len(tokens), None)

    def overwrite(self, blocks: list[int], forward: Callable[[], None]) -> None:
        """The next step gives the blocks to somebody else, who writes them at once."""
        plan, _ = self.engine.step([], [blocks])
        self._step(plan, forward)

    def filling(self) -> int:
        """Offloaded blocks that are not visible yet."""
        self.engine.pending_work()
        return dict(self.engine.gauges())["filling_slots"]

    def settle(self) -> None:
        """Waits until all offloads are visible."""
        deadline = time.monotonic() + PATIENCE_S
        while self.filling():
            if time.monotonic() > deadline:
                raise TimeoutError("offloads never became visible")
            time.sleep(POLL_S)

    def begin_load(self, name: str, targets: list[int]) -> str:
        """A step that loads what was stored under `name` into these blocks. Waits for nothing. Returns the request."""
        self._requests += 1
        request, tokens = f"load {self._requests}", len(targets) * BLOCK_TOKENS
        self.engine.add_request(request, None, "")
        found = self.engine.lookup(request, tokens + 1, 0, self.hashes(name, len(targets)))
        if found != tokens:
            raise LookupError(f"{found} of {tokens} tokens were found")
        self.engine.admit(request, tokens, [targets])
        self._step(self.engine.step([], [])[0], lambda: None)
        return request

    def is_loaded(self, request: str) -> bool:
        """Whether this load was reported since the last look."""
        finished, failed = self.worker.take_results()
        if failed:
            raise RuntimeError(f"loads failed: {failed}")
        self.engine.loads_ended(finished, [])
        return request in finished

    def wait_for(self, request: str) -> None:
        """Waits until this load is reported."""
        deadline = time.monotonic() + PATIENCE_S
        while not self.is_loaded(request):
            if time.monotonic() > deadline:
                raise TimeoutError("the load never ended")
            time.sleep(POLL_S)


def pick(generator: random.Random, blocks: int, count: int, in_a_row: bool) -> tuple[list[int], list[int]]:
    """Distinct blocks to store and others to load into. Block 0 is vLLM's null block."""
    ids = list(range(1, blocks))
    if not in_a_row:
        generator.shuffle(ids)
    return ids[:count], ids[count : 2 * count]
