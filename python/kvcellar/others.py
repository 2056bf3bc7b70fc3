"""Blocks that another connector fills, where KV Cellar runs beside others under MultiConnector.

vLLM counts the tokens of such a load as computed before a byte has come, and hands the blocks over without a step. So
two things are asked of each block: may we store it (only what a step computed or we loaded), and does a copy of ours
still read what it held before (then the other connector has to wait).
"""

from collections.abc import Sequence
from operator import attrgetter

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.request import Request

from kvcellar.groups import Groups
from kvcellar.offers import Blocks
from kvcellar.requests import KnownRequest

_block_id = attrgetter("block_id")


class ForeignBlocks:
    """vLLM's ids of the blocks that hold, wholly or in part, what another connector loaded.

    Bounded by the number of vLLM's blocks.
    """

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self._blocks: set[int] = set()
        self._admitted: list[tuple[Request, KnownRequest | None]] = []

    def admitted(self, request: Request, known: KnownRequest | None) -> None:
        """vLLM admitted a request and asked nothing of us: another connector may load for it."""
        self._admitted.append((request, known))

    def loaded_by_us(self, tables: Sequence[Sequence[int]]) -> None:
        """These blocks are filled by a load of ours."""
        for table in tables:
            self._blocks.difference_update(table)

    def step(self, handed: Sequence[Sequence[int]], manager: KVCacheManager) -> list[int]:
        """Take note of a step.

        Args:
            handed: blocks that this step computes. Those of requests that wait for another connector are not in it.
            manager: vLLM's block tables.

        Returns:
            Blocks that another connector may write from now on.
        """
        for blocks in handed:
            self._blocks.difference_update(blocks)
        written: list[int] = []
        for request, known in self._admitted:
            begin = 0 if known is None else known.local + known.loaded
            end = request.num_computed_tokens
            if end <= begin:
                continue
            if known is not None:
                known.limit = begin
            tables = manager.get_blocks(request.request_id).blocks
            for group, table in zip(self._groups.groups, tables, strict=True):
                tokens = group.block_tokens
                written += map(_block_id, table[begin // tokens : -(-end // tokens)])
        self._admitted.clear()
        # The null block is nobody's.
        written = [block for block in written if block != 0]
        self._blocks.update(written)
        return written

    def bound(self, known: KnownRequest, fresh: Sequence[Blocks], ready: int) -> int:
        """The first of ``ready`` tokens from which on nothing of a request may be stored.

        Args:
            known: the request.
            fresh: per group, the blocks that would be offered.
            ready: tokens that vLLM counts as complete.
        """
        bound = ready if known.limit is None else min(ready, known.limit)
        for group, (first, blocks) in zip(self._groups.groups, fresh, strict=True):
            if not self._blocks.isdisjoint(blocks):
                foreign = next(number for number, block in enumerate(blocks, first) if block in self._blocks)
                bound = min(bound, foreign * group.block_tokens)
        return bound
