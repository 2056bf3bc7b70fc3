"""vLLM's KV cache groups, as the native engine wants to know them."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import cached_property

from vllm.config import VllmConfig
from vllm.v1.core.kv_cache_utils import resolve_dcp_kv_block_size, resolve_kv_cache_block_sizes
from vllm.v1.core.sched import output as scheduler_output
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    MambaSpec,
    SlidingWindowSpec,
    get_kv_cache_spec_kind,
    iter_layer_specs,
)

from kvcellar import UnsupportedError

REMEDY = (
    'Serve without KV Cellar, or write "unsupported_groups": "bypass" into kv_connector_extra_config to serve without '
    "its tiers"
)
# What the native engine calls a kind: a name, or a name with its figures.
Rule = str | dict[str, dict[str, int]]


@dataclass(frozen=True)
class Group:
    """One KV cache group.

    Attributes:
        kind: vLLM's name of the attention kind, as events carry it.
        rule: which blocks a hit needs, as the native engine writes it.
        block_tokens: tokens of one block, of all ranks that share them.
        eagle: the group belongs to a draft model whose last block must be left out of a hit.
    """

    kind: str
    rule: Rule
    block_tokens: int
    eagle: bool = False

    @property
    def holds_states(self) -> bool:
        """Whether a block holds the state at its end.

        vLLM names each block that has one, because a table does not tell: other blocks of it are null, or hold a state
        that is still moving.
        """
        return self.rule == "state"

    @property
    def window(self) -> int | None:
        """Sliding window or chunk in tokens, for events."""
        if isinstance(self.rule, str):
            return None
        (figures,) = self.rule.values()
        return figures.get("window", figures.get("chunk"))

    def native(self) -> dict[str, object]:
        """The group in the native engine's JSON."""
        return {"kind": self.rule, "kind_name": self.kind, "block_tokens": self.block_tokens, "eagle": self.eagle}


@dataclass(frozen=True)
class Groups:
    """All groups of a model.

    Attributes:
        groups: in vLLM's order.
        hash_tokens: tokens one element of ``request.block_hashes`` covers.
        hit_tokens: granularity of a hit.
        written_early: the model runner writes blocks that it was given (zeroes them, moves states) before it lets a
            connector wait for copies that still read them.
    """

    groups: tuple[Group, ...]
    hash_tokens: int
    hit_tokens: int
    written_early: bool = False

    def native(self) -> str:
        """The groups in the native engine's JSON."""
        return json.dumps(
            {
                "groups": [group.native() for group in self.groups],
                "hash_tokens": self.hash_tokens,
                "hit_tokens": self.hit_tokens,
            }
        )

    @cached_property
    def hold_states(self) -> bool:
        """Whether any group holds states."""
        return any(group.holds_states for group in self.groups)

    @cached_property
    def are_found_in_parts(self) -> bool:
        """Whether a hit of vLLM's own may end within a block, of which connectors are not told."""
        return any(group.block_tokens > self.hash_tokens for group in self.groups)


def _one_value(index: int, what: str, values: Iterable[int]) -> int:
    """The value that all layers of a group have in common."""
    different = sorted(set(values))
    if len(different) != 1:
        raise UnsupportedError(f"KV cache group {index} mixes {what} {different}. {REMEDY}")
    return different[0]


def _full(_index: int, _layers: list[KVCacheSpec]) -> Rule:
    return "full"


def _sliding_window(index: int, layers: list[KVCacheSpec]) -> Rule:
    windows = [layer for layer in layers if isinstance(layer, SlidingWindowSpec)]
    if len(windows) != len(layers):
        raise UnsupportedError(f"KV cache group {index} has a sliding window and names none. {REMEDY}")
    window = _one_value(index, "windows", (layer.sliding_window for layer in windows))
    extra = _one_value(index, "retained tokens", (getattr(layer, "extra_retained_tokens", 0) for layer in windows))
    return {"sliding_window": {"window": window, "extra": extra}}


def _chunked_local(index: int, layers: list[KVCacheSpec]) -> Rule:
    chunks = (layer.attention_chunk_size for layer in layers if isinstance(layer, ChunkedLocalAttentionSpec))
    return {"chunked_local": {"chunk": _one_value(index, "chunks", chunks)}}


def _state(index: int, layers: list[KVCacheSpec]) -> Rule:
    modes = {layer.mamba_cache_mode for layer in layers if isinstance(layer, MambaSpec)}
    if modes != {"align"}:
        raise UnsupportedError(
            f"KV cache group {index} holds states, and vLLM keeps none of them at the end of a prefix "
            f"(mamba_cache_mode {'/'.join(sorted(modes))}). Start vLLM with --enable-prefix-caching "
            f"--mamba-cache-mode align, or serve without KV Cellar"
        )
    if not _tells_of_states():
        raise UnsupportedError(
            f"KV cache group {index} holds states, and this vLLM does not tell which blocks have one. Update vLLM to "
            f"0.32. {REMEDY}"
        )
    return "state"


def _tells_of_states() -> bool:
    told = getattr(scheduler_output, "KVConnectorBlockState", None)
    return told is not None and any(field.name == "boundary_state_offloads" for field in fields(told))


# By vLLM's name of a kind. Whatever is not here is served without KV Cellar.
_RULES: dict[str, Callable[[int, list[KVCacheSpec]], Rule]] = {
    "full_attention": _full,
    "mla_attention": _full,
    "sink_full_attention": _full,
    "sliding_window": _sliding_window,
    "sliding_window_mla": _sliding_window,
    "chunked_local_attention": _chunked_local,
    "mamba": _state,
}


def shares(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, rank: int) -> tuple[tuple[int, ...], ...]:
    """For each group, what this tensor-parallel rank holds of its blocks.

    Ranks of one pipeline stage that say the same hold the same bytes, which are kept once. To be asked in a worker: in
    EngineCore, vLLM lets one layer stand for a group of different ones.

    Args:
        vllm_config: vLLM's configuration.
        kv_cache_config: this worker's groups.
        rank: this worker's tensor-parallel rank.
    """
    ranks: int = vllm_config.parallel_config.tensor_parallel_size
    dcp: int = vllm_config.parallel_config.decode_context_parallel_size

    def of_layer(layer: KVCacheSpec) -> int:
        if isinstance(layer, MambaSpec):
            return 0 if getattr(layer, "tp_replicated", False) else rank
        shards = getattr(layer, "max_tp_shards", None)
        heads = rank if shards is None else rank // max(1, ranks // int(shards))
        # Of the tokens of these heads, each rank of a context parallel group has its own.
        return heads * dcp + rank % dcp if layer.dcp_sharded else heads

    def of_group(spec: KVCacheSpec) -> tuple[int, ...]:
        return tuple(of_layer(layer) for layer in iter_layer_specs(spec))

    return tuple(of_group(group.kv_cache_spec) for group in kv_cache_config.kv_cache_groups)


def _eagle(kind: str, drops: bool, is_draft: bool, annotated: bool) -> bool:
    """Whether a hit leaves out the group's last block. Where no group is marked, vLLM drops it in every one.

    States have no draft: vLLM looks for the one at the hit's end and no other.
    """
    return drops and kind != "mamba" and (is_draft or not annotated)


def describe(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> Groups:
    """Describe the model's groups.

    Raises:
        UnsupportedError: for a group of a kind that cannot be kept (named, with its index), prefill context
            parallelism, or a model without KV cache.
    """
    parallel = vllm_config.parallel_config
    if parallel.prefill_context_parallel_size > 1:
        raise UnsupportedError(
            f"prefill_context_parallel_size of {parallel.prefill_context_parallel_size} is not supported, "
            f"decode_context_parallel_size is. {REMEDY}"
        )
    if not kv_cache_config.kv_cache_groups:
        raise UnsupportedError(f"This model has no KV cache. {REMEDY}")
    draft = vllm_config.speculative_config
    drops = draft is not None and draft.use_eagle_block_drop()
    annotated = any(group.is_eagle_group for group in kv_cache_config.kv_cache_groups)
    groups = []
    for index, group in enumerate(kv_cache_config.kv_cache_groups):
        spec = group.kv_cache_spec
        kind = get_kv_cache_spec_kind(spec).value
        if not group.enable_kv_transfer or not spec.prefix_cacheable:
            raise UnsupportedError(f"KV cache group {index} of kind {kind} cannot be kept by its hashes. {REMEDY}")
        layers = list(iter_layer_specs(spec))
        if kind not in _RULES or not layers:
            raise UnsupportedError(f"KV cache group {index} is of kind {kind}, which is not supported. {REMEDY}")
        rule = _RULES[kind](index, layers)
        groups.append(
            Group(
                kind,
                rule,
                resolve_dcp_kv_block_size(spec, parallel.decode_context_parallel_size),
                eagle=_eagle(kind, drops, group.is_eagle_group, annotated),
            )
        )
    hold_states = any(group.holds_states for group in groups)
    if hold_states and draft is not None and parallel.pipeline_parallel_size > 1:
        raise UnsupportedError(
            "Pipeline parallel ranks of a model with states and speculative decoding write a state after copies of it "
            f"have begun. {REMEDY}"
        )
    hit_tokens, hash_tokens = resolve_kv_cache_block_sizes(kv_cache_config, vllm_config)
    zeroes = getattr(kv_cache_config, "needs_kv_cache_zeroing", False) or hold_states
    written_early = zeroes and getattr(vllm_config, "use_v2_model_runner", True)
    return Groups(tuple(groups), hash_tokens, hit_tokens, written_early)
