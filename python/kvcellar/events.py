"""The native engine's events as vLLM's own event objects."""

from collections.abc import Sequence
from typing import Any

import msgspec
from vllm import envs
from vllm.distributed.kv_events import MEDIUM_CPU, MEDIUM_STORAGE, BlockRemoved, BlockStored, KVCacheEvent
from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys, to_event_extra_keys
from vllm.v1.request import Request

from kvcellar._native import RemovedRun, StoredRun
from kvcellar.groups import Groups

_MEDIUM = {"dram": MEDIUM_CPU, "nvme": MEDIUM_STORAGE}


def encode_extra_keys(request: Request, first_token: int, blocks: int, block_tokens: int) -> list[bytes]:
    """Encode what went into the hashes of a request's blocks beside their tokens.

    One element a block; none at all where there is nothing.
    Rare: only requests with LoRA, multimodal input, cache salt or prompt embeddings have such keys.
    """
    if not (request.lora_request or request.mm_features or request.cache_salt or request.prompt_embeds is not None):
        return []
    encoded = []
    for block in range(blocks):
        start = first_token + block * block_tokens
        keys, _ = generate_block_hash_extra_keys(request, start, start + block_tokens, 0)
        encoded.append(msgspec.msgpack.encode(keys))
    return encoded


def _decode_extra_keys(blocks: Sequence[bytes] | None) -> list[tuple[Any, ...] | None] | None:
    if blocks is None:
        return None
    decoded = [msgspec.msgpack.decode(block) if block else None for block in blocks]
    made: list[tuple[Any, ...] | None] | None = to_event_extra_keys([_tuples(keys) for keys in decoded])
    return made


def _tuples(keys: list[Any] | None) -> tuple[Any, ...] | None:
    """msgpack has no tuples; vLLM's extra keys are made of them."""
    if keys is None:
        return None
    return tuple(tuple(key) if isinstance(key, list) else key for key in keys)


class EventMaker:
    """Makes vLLM's events; hashes in the form vLLM publishes its own."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self.integer_hashes = bool(envs.VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES)

    def make(self, run: StoredRun | RemovedRun) -> KVCacheEvent:
        """Make the event for one run of blocks."""
        if isinstance(run, RemovedRun):
            return BlockRemoved(
                block_hashes=run.hashes, medium=_MEDIUM[run.tier], group_idx=run.group, locality="LOCAL"
            )
        group = self._groups.groups[run.group]
        return BlockStored(
            block_hashes=run.hashes,
            parent_block_hash=run.parent,
            token_ids=run.tokens,
            block_size=group.block_tokens,
            lora_id=None,
            medium=_MEDIUM[run.tier],
            lora_name=run.lora_name,
            extra_keys=_decode_extra_keys(run.extra),
            group_idx=run.group,
            kv_cache_spec_kind=group.kind,
            kv_cache_spec_sliding_window=group.window,
            locality="LOCAL",
        )
