"""A fake engine's numbers, under vLLM's names."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.vllm.fake_answers import MODEL


@dataclass
class Said:
    """What it says of itself instead of what is so; what is `None` stays as it is.

    Attributes:
        adapters_max: how many adapters may be loaded at a time; 0: it says nothing of adapters.

    """

    running: int | None = None
    waiting: int | None = None
    kv_usage: float | None = None
    adapters_max: int = 0
    adapters_running: list[str] = field(default_factory=list)
    adapters_waiting: list[str] = field(default_factory=list)


@dataclass
class Numbers:
    """Counted since its process began."""

    blocks: int
    block_tokens: int
    started_s: float = field(default_factory=time.time)
    open: int = 0
    now_running: int = 0
    ended: int = 0
    queried_tokens: int = 0
    hit_tokens: int = 0
    said: Said = field(default_factory=Said)

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """A request is in the engine."""
        self.open += 1
        try:
            yield
        finally:
            self.open -= 1
            self.ended += 1

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """It runs."""
        self.now_running += 1
        try:
            yield
        finally:
            self.now_running -= 1

    def computed(self, tokens: int, cached: int) -> None:
        """A prompt was looked up."""
        self.queried_tokens += tokens
        self.hit_tokens += cached

    def state(self) -> dict[str, int]:
        """For the test."""
        return {"open": self.open, "ended": self.ended}

    def text(self, usage: float) -> str:
        """The body of /metrics."""
        labels = f'{{engine="0",model_name="{MODEL}"}}'
        config = f'block_size="{self.block_tokens}",cache_dtype="auto",engine="0",num_gpu_blocks="{self.blocks}"'
        said = self.said
        running = self.now_running if said.running is None else said.running
        waiting = self.open - self.now_running if said.waiting is None else said.waiting
        rows = [
            ("gauge", "vllm:num_requests_running", labels, running),
            ("gauge", "vllm:num_requests_waiting", labels, waiting),
            ("gauge", "vllm:kv_cache_usage_perc", labels, usage if said.kv_usage is None else said.kv_usage),
            ("gauge", "vllm:cache_config_info", f"{{{config}}}", 1),
            ("counter", "vllm:prefix_cache_queries", labels, self.queried_tokens),
            ("counter", "vllm:prefix_cache_hits", labels, self.hit_tokens),
            ("gauge", "process_start_time_seconds", "", self.started_s),
        ]
        if said.adapters_max:
            names = (",".join(said.adapters_running), ",".join(said.adapters_waiting))
            adapters = f'max_lora="{said.adapters_max}",running_lora_adapters="{names[0]}"'
            adapters += f',waiting_lora_adapters="{names[1]}"'
            rows.append(("gauge", "vllm:lora_requests_info", f"{{{adapters}}}", time.time()))
        lines = []
        for kind, name, row_labels, value in rows:
            full = f"{name}_total" if kind == "counter" else name
            lines += [f"# HELP {full} As vLLM's.", f"# TYPE {full} {kind}", f"{full}{row_labels} {float(value)}"]
        return "\n".join(lines) + "\n"
