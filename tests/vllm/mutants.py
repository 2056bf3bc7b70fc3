"""Deliberately broken connectors. A test that passes with one of these is a defect."""

from typing import Any

from kvcellar.connector import KVCellarConnector
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory


class SwappedGroupsConnector(KVCellarConnector):
    """Loads the blocks of every sliding-window or chunked group into the blocks of the next one.

    Offloads are right, so each block lies in the pool under its true key. The mapping is broken between vLLM's block
    tables and us and not between groups and tensors: groups of one layer each share the same tensor, and swapping their
    views would change nothing.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        """Notes which groups have a sliding window, or chunks."""
        super().__init__(vllm_config, role, kv_cache_config)
        specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
        local = ("sliding_window", "attention_chunk_size")
        self._sliding = [i for i, spec in enumerate(specs) if any(getattr(spec, name, None) for name in local)]

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Hands the real connector the tables of the sliding-window groups, one group further on."""
        tables = list(blocks.blocks)
        for index, following in zip(self._sliding, self._sliding[1:] + self._sliding[:1], strict=True):
            tables[index] = blocks.blocks[following]
        super().update_state_after_alloc(request, type(blocks)(tuple(tables)), num_external_tokens)


class LateStatesConnector(KVCellarConnector):
    """Keeps each state under the name of the block before it: what is loaded is one block ahead."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        if self._scheduler is None:
            return
        offer = self._scheduler._offer

        def late(known: Any, ready: int, held: Any = None) -> Any:
            moved = {
                group: {number - 1: block for number, block in blocks.items() if number > 0}
                for group, blocks in (held or {}).items()
            }
            return offer(known, ready, {group: blocks for group, blocks in moved.items() if blocks})

        self._scheduler._offer = late  # type: ignore[method-assign]


class IdleConnector(KVCellarConnector):
    """A connector that is there and does nothing: what vLLM alone changes because it has one."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._scheduler = None
        self._worker = None


class KeepsForeignBlocksConnector(KVCellarConnector):
    """Stores what another connector was to load as if it had come."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        """Takes the bound away up to which blocks may be stored, of running requests and of those that end."""
        super().__init__(vllm_config, role, kv_cache_config)
        if self._scheduler is None:
            return
        assert self._scheduler._foreign is not None
        self._scheduler._foreign.bound = lambda known, fresh, ready: ready  # type: ignore[method-assign]
        finish = self._scheduler.finish

        def credulous(request: Any) -> None:
            assert self._scheduler is not None
            known = self._scheduler._requests.get(request.request_id)
            if known is not None:
                known.scheduled = True
            finish(request)

        self._scheduler.finish = credulous  # type: ignore[method-assign]


class UnfencedForeignBlocksConnector(KVCellarConnector):
    """Does not wait for its own copies of blocks that vLLM hands to another connector."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        """Forgets which blocks the other one may write."""
        super().__init__(vllm_config, role, kv_cache_config)
        if self._scheduler is None:
            return
        assert self._scheduler._foreign is not None
        step = self._scheduler._foreign.step

        def forgetful(handed: Any, manager: Any) -> list[int]:
            step(handed, manager)
            return []

        self._scheduler._foreign.step = forgetful  # type: ignore[method-assign]


# MultiConnector finds the class that reads its part's figures by name alone.
for _mutant in (KeepsForeignBlocksConnector, UnfencedForeignBlocksConnector):
    if _mutant.__name__ not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(_mutant.__name__, __name__, _mutant.__name__)
