"""What a run measured: times by source, compared outputs, hit tokens."""

import statistics
from dataclasses import dataclass, field

from quickstart_lib.client import Answer
from quickstart_lib.metrics import NO_HITS, Hits

COLD = "cold"
GPU_HIT = "gpu_hit"
DRAM_HIT = "dram_hit"
NVME_HIT = "nvme_hit"
RESTART_HIT = "restart_hit"
RESUMED = "resumed_turn"
EVICTED_HIT = "dram_hit_after_eviction"
RECOMPUTED = "recomputed"
OPENING = "opening_turn"
EVICTED_RECOMPUTED = "recomputed_after_eviction"
# In the order they are shown: first one prompt from each source, then what the conversations met on
# the way.
MEANINGS = {
    COLD: "never seen before",
    GPU_HIT: "sent again at once: vLLM's own prefix cache",
    DRAM_HIT: "after vLLM's cache was emptied: KV Cellar's DRAM tier",
    NVME_HIT: "pushed out of the DRAM tier as well: KV Cellar's NVMe tier",
    RESTART_HIT: "server started again, memory gone: only the NVMe tier",
    RECOMPUTED: "after vLLM's cache was emptied: computed again",
    OPENING: "first turn of a conversation",
    RESUMED: "later turn, the conversation evicted meanwhile",
    EVICTED_HIT: "the whole conversation after eviction: DRAM tier",
    EVICTED_RECOMPUTED: "the whole conversation after eviction: computed again",
}


@dataclass
class Samples:
    """Requests of one source. Times in seconds; tokens summed over the requests."""

    ttft_seconds: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    hits: Hits = NO_HITS

    def median_seconds(self) -> float:
        """Median time to first token."""
        return statistics.median(self.ttft_seconds)

    def spread_seconds(self) -> float:
        """Interquartile range of the time to first token; 0 for a single sample."""
        if len(self.ttft_seconds) < 2:
            return 0.0
        first, _, third = statistics.quantiles(self.ttft_seconds, n=4, method="inclusive")
        return third - first


@dataclass
class Measurements:
    """Everything a run collects. `differences` holds one text per pair that was not bit for bit the same."""

    sources: dict[str, Samples] = field(default_factory=dict)
    pairs_compared: int = 0
    logprobs_compared: int = 0
    differences: list[str] = field(default_factory=list)
    empty_hits: list[str] = field(default_factory=list)
    gpu_blocks_evicted: int = 0

    def record(self, source: str, prompt: list[int], answer: Answer, hits: Hits = NO_HITS) -> None:
        """Add one request to `source`."""
        samples = self.sources.setdefault(source, Samples())
        samples.ttft_seconds.append(answer.ttft_seconds)
        samples.prompt_tokens += len(prompt)
        samples.cached_tokens += answer.cached_tokens
        samples.hits += hits

    def compare(self, name: str, after_gpu_hit: Answer, after_tier_hit: Answer) -> None:
        """Compare the two outputs of one prompt, and the lengths of the two hits when they differ."""
        self.pairs_compared += 1
        self.logprobs_compared += after_tier_hit.logprob_count
        found = after_tier_hit.differences(after_gpu_hit)
        if found:
            hits = f"hit lengths {after_tier_hit.cached_tokens} and {after_gpu_hit.cached_tokens} tokens"
            self.differences.append(f"{name} ({hits}): the hit gives {'; '.join(found)}")

    @property
    def outputs_identical(self) -> bool:
        """Whether pairs were compared and all of them were the same."""
        return self.pairs_compared > 0 and not self.differences

    @property
    def hits(self) -> Hits:
        """Prompt tokens that the tiers supplied, over all sources."""
        return sum((samples.hits for samples in self.sources.values()), NO_HITS)
