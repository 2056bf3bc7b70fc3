"""A fake engine's numbers, under vLLM's names."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.vllm.fake_answers import MODEL


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
        rows = [
            ("gauge", "vllm:num_requests_running", labels, self.now_running),
            ("gauge", "vllm:num_requests_waiting", labels, self.open - self.now_running),
            ("gauge", "vllm:kv_cache_usage_perc", labels, usage),
            ("gauge", "vllm:cache_config_info", f"{{{config}}}", 1),
            ("counter", "vllm:prefix_cache_queries", labels, self.queried_tokens),
            ("counter", "vllm:prefix_cache_hits", labels, self.hit_tokens),
            ("gauge", "process_start_time_seconds", "", self.started_s),
        ]
        lines = []
        for kind, name, row_labels, value in rows:
            full = f"{name}_total" if kind == "counter" else name
            lines += [f"# HELP {full} As vLLM's.", f"# TYPE {full} {kind}", f"{full}{row_labels} {float(value)}"]
        return "\n".join(lines) + "\n"
