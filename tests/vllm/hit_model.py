"""Predicts every hit of an engine that serves one request at a time, from the requests' tokens alone.

Both caches are modelled: vLLM's own (`gpu_model`) and our dram tier (`cache_model`). Nothing the engine says goes in.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.vllm.cache_model import DramTier
from tests.vllm.gpu_model import PrefixCache


@dataclass(frozen=True)
class Prediction:
    """What one request finds, in tokens."""

    local: int
    external: int


@dataclass
class HitModel:
    """Both caches of one engine."""

    gpu: PrefixCache
    dram: DramTier
    block_tokens: int
    chunk_tokens: int
    served: int = 0
    local_tokens: int = 0
    external_tokens: int = 0
    evicted_blocks: int = 0
    stored_blocks: int = 0
    history: list[Prediction] = field(default_factory=list)

    def keys(self, tokens: Sequence[int]) -> list[str]:
        """A name for every full block that depends on all tokens up to its end."""
        digest = hashlib.sha256()
        names = []
        for end in range(self.block_tokens, len(tokens) + 1, self.block_tokens):
            digest.update(repr(tuple(tokens[end - self.block_tokens : end])).encode())
            names.append(digest.hexdigest()[:16])
        return names

    def serve(self, prompt: Sequence[int], answer: Sequence[int]) -> Prediction:
        """One request. The last token of an answer is sampled and never computed."""
        self.served += 1
        request = f"request-{self.served}"
        computed = [*prompt, *answer[:-1]]
        keys = self.keys(computed)
        limit = (len(prompt) - 1) // self.block_tokens
        local = self.gpu.match(keys, limit) * self.block_tokens
        external = self.dram.hit(keys, local, limit * self.block_tokens, self.block_tokens)
        start = local + external
        loaded = keys[local // self.block_tokens : start // self.block_tokens]
        self.dram.pin(loaded, request)
        self.dram.unpin(loaded)
        self.gpu.run(keys, local // self.block_tokens, -(-len(computed) // self.block_tokens))
        for begin, end in self._steps(start, len(prompt), len(computed)):
            first = 0 if begin == start else begin // self.block_tokens
            self._store(keys[first : end // self.block_tokens], request)
        self.dram.touch([key for key in keys if self.dram.unpinned(key)], request)
        self.local_tokens += local
        self.external_tokens += external
        self.history.append(Prediction(local, external))
        return self.history[-1]

    def _steps(self, start: int, prompt_tokens: int, computed: int) -> list[tuple[int, int]]:
        """First and last token of every step: chunks of the prompt, then one token each."""
        steps = []
        position = start
        while position < computed:
            length = min(self.chunk_tokens, prompt_tokens - position) if position < prompt_tokens else 1
            steps.append((position, position + length))
            position += length
        return steps

    def _store(self, candidates: Sequence[str], request: str) -> None:
        """Offers the blocks that are complete after a step: at first all of the request's, then new ones."""
        self.dram.touch([key for key in candidates if self.dram.unpinned(key)], request)
        placed = self.dram.place([key for key in candidates if not self.dram.resident(key)], request)
        self.dram.fill(placed.stored)
        self.evicted_blocks += len(placed.evicted)
        self.stored_blocks += len(placed.stored)
