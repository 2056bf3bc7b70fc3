"""The tier engine and a copy worker over torch tensors, in one process, as vLLM drives them; without vLLM."""

import hashlib
import json
import random
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
PATIENCE_S = 60


def why_skipped() -> str | None:
    """Why nothing of this can run here."""
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    if torch.version.hip is not None:
        return "the GPU is not NVIDIA's"
    return None


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
    """One flat allocation, and each layer's view of it with the dimensions [kernel blocks, heads, tokens, width]."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
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
        self.layers = [
            self.memory.as_strided(
                (pages, shape.heads, shape.tokens, shape.width), (page_stride, *inner, 1), layer * layer_stride
            )
            for layer in range(shape.layers)
        ]

    def views(self) -> str:
        """What the connector would register."""
        layers = [views.layer_view(str(at), layer, self.shape.blocks) for at, layer in enumerate(self.layers)]
        return views.native([layers])

    def block(self, block: int) -> torch.Tensor:
        """A copy of a block's bytes of all layers."""
        ratio = self.shape.ratio
        return torch.stack([layer[block * ratio : (block + 1) * ratio] for layer in self.layers]).clone()

    def scramble(self, blocks: list[int]) -> None:
        """New random bytes for these blocks, on the current stream. Not waited for."""
        ratio = self.shape.ratio
        for layer in self.layers:
            for block in blocks:
                layer[block * ratio : (block + 1) * ratio].random_(0, 256)


class Rig:
    """An engine and a worker over one cache. As a context manager it lets go at the end."""

    def __init__(self, cache: Cache, slots: int, pool_dir: Path, nvrtc: list[str]) -> None:
        self.cache = cache
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
        ranks = [{"block_bytes": self.worker.block_bytes, "replica_of": None}]
        self.engine.open_pool(json.dumps(ranks), '{"model": "hardware"}', True, lambda _done, _total: None)
        ticket = self.engine.ticket()
        if ticket is None:
            raise RuntimeError("the engine gave no ticket")
        self.worker.attach(ticket)
        self._requests = 0

    def __enter__(self) -> "Rig":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.worker.release(0.0)
        self.engine.close()

    def _stream(self) -> int | None:
        device = self.cache.memory.device
        return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None

    def _step(self, plan: bytes, forward: Callable[[], None]) -> None:
        self.worker.begin_step(plan, self._stream())
        self.worker.start_loads(self._stream())
        forward()
        self.worker.finish_step(self._stream())

    def hashes(self, name: str, count: int) -> list[bytes]:
        """Names for as many blocks."""
        return [hashlib.sha256(f"{name} {at}".encode()).digest() for at in range(count)]

    def store(self, name: str, blocks: list[int], forward: Callable[[], None]) -> None:
        """One step that computes these blocks by `forward` and offloads them. Waits for nothing."""
        self.engine.add_request(name, None, "")
        self.engine.lookup(name, len(blocks) * BLOCK_TOKENS + 1, 0, self.hashes(name, len(blocks)))
        self.engine.admit(name, 0, [])
        tokens = list(range(len(blocks) * BLOCK_TOKENS))
        plan, _ = self.engine.step([(name, [], 0, tokens, [(0, blocks, [])])], [])
        self._step(plan, forward)

    def overwrite(self, blocks: list[int], forward: Callable[[], None]) -> None:
        """The next step gives the blocks to somebody else, who writes them at once."""
        plan, _ = self.engine.step([], [blocks])
        self._step(plan, forward)

    def settle(self) -> None:
        """Waits until all offloads are visible."""
        deadline = time.monotonic() + PATIENCE_S
        while dict(self.engine.gauges())["filling_slots"]:
            self.engine.pending_work()
            if time.monotonic() > deadline:
                raise TimeoutError("offloads never became visible")
            time.sleep(0.0005)

    def load(self, name: str, targets: list[int]) -> None:
        """Loads what was stored under `name` into these blocks, and waits for it."""
        self._requests += 1
        request, tokens = f"load {self._requests}", len(targets) * BLOCK_TOKENS
        self.engine.add_request(request, None, "")
        found = self.engine.lookup(request, tokens + 1, 0, self.hashes(name, len(targets)))
        if found != tokens:
            raise LookupError(f"{found} of {tokens} tokens were found")
        self.engine.admit(request, tokens, [targets])
        self._step(self.engine.step([], [])[0], lambda: None)
        deadline = time.monotonic() + PATIENCE_S
        finished: list[str] = []
        while not finished:
            finished, failed = self.worker.take_results()
            if failed or time.monotonic() > deadline:
                raise RuntimeError(f"the load failed: {self.worker.take_notes()}")
        self.engine.loads_ended(finished, [])


def pick(generator: random.Random, blocks: int, count: int, in_a_row: bool) -> tuple[list[int], list[int]]:
    """Distinct blocks to store and others to load into. Block 0 is vLLM's null block."""
    ids = list(range(1, blocks))
    if not in_a_row:
        generator.shuffle(ids)
    return ids[:count], ids[count : 2 * count]
