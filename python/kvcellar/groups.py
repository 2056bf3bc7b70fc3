"""vLLM's KV cache groups, as the native engine wants to know them."""

import json
from dataclasses import dataclass

from vllm.config import VllmConfig
from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes
from vllm.v1.kv_cache_interface import (
    KVCacheConfig,
    KVCacheSpec,
    SlidingWindowSpec,
    get_kv_cache_spec_kind,
    iter_layer_specs,
)

from kvcellar import UnsupportedError

REMEDY = (
    'Serve without KV Cellar, or write "unsupported_groups": "bypass" into kv_connector_extra_config to serve without '
    "its tiers"
)


@dataclass(frozen=True)
class Group:
    """One KV cache group.

    Attributes:
        kind: vLLM's name of the attention kind, as events carry it.
        block_tokens: tokens of one block.
        window: sliding window in tokens, or None.
        extra_tokens: tokens kept below the window for speculative decoding.
        eagle: the group belongs to a draft model whose last block must be left out of a hit.
    """

    kind: str
    block_tokens: int
    window: int | None
    extra_tokens: int
    eagle: bool

    def native(self) -> dict[str, object]:
        """The group in the native engine's JSON."""
        if self.window is not None:
            kind: object = {"sliding_window": {"window": self.window, "extra": self.extra_tokens}}
        else:
            kind = "mla" if self.kind == "mla_attention" else "full"
        return {"kind": kind, "kind_name": self.kind, "block_tokens": self.block_tokens, "eagle": self.eagle}


@dataclass(frozen=True)
class Groups:
    """All groups of a model.

    Attributes:
        groups: in vLLM's order.
        hash_tokens: tokens one element of ``request.block_hashes`` covers.
        hit_tokens: granularity of a hit.
    """

    groups: tuple[Group, ...]
    hash_tokens: int
    hit_tokens: int

    def native(self) -> str:
        """The groups in the native engine's JSON."""
        return json.dumps(
            {
                "groups": [group.native() for group in self.groups],
                "hash_tokens": self.hash_tokens,
                "hit_tokens": self.hit_tokens,
            }
        )


def _one_spec(index: int, spec: KVCacheSpec) -> KVCacheSpec:
    """The spec that stands for all layers of a group."""
    layers = list(iter_layer_specs(spec))
    if not layers:
        raise UnsupportedError(f"KV cache group {index} has no layers. {REMEDY}")
    return layers[0]


def _group(index: int, spec: KVCacheSpec, eagle: bool) -> Group:
    kind = get_kv_cache_spec_kind(spec).value
    if kind not in ("full_attention", "mla_attention", "sliding_window"):
        raise UnsupportedError(f"KV cache group {index} is of kind {kind}, which is not supported. {REMEDY}")
    layer = _one_spec(index, spec)
    if kind == "sliding_window":
        if not isinstance(layer, SlidingWindowSpec):
            raise UnsupportedError(f"KV cache group {index} of kind {kind} names no window. {REMEDY}")
        windows = {getattr(other, "sliding_window", None) for other in iter_layer_specs(spec)}
        if len(windows) != 1:
            raise UnsupportedError(f"KV cache group {index} mixes windows {windows}. {REMEDY}")
        return Group(kind, layer.block_size, layer.sliding_window, layer.extra_retained_tokens, eagle)
    return Group(kind, layer.block_size, None, 0, eagle)


def describe(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> Groups:
    """Describe the model's groups.

    Raises:
        UnsupportedError: for a group of another kind than full attention, MLA or sliding window (named, with its
        index),
            context parallelism, a model without KV cache, or one whose blocks are zeroed before we are told.
    """
    parallel = vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise UnsupportedError(f"{name} of {getattr(parallel, name)} is not supported. {REMEDY}")
    if not kv_cache_config.kv_cache_groups:
        raise UnsupportedError(f"This model has no KV cache. {REMEDY}")
    zeroes = getattr(kv_cache_config, "needs_kv_cache_zeroing", False)
    if zeroes and getattr(vllm_config, "use_v2_model_runner", True):
        # Runner V2 zeroes a step's new blocks before it tells the connector of the step: a copy
        # that still reads one of them could not be waited for.
        raise UnsupportedError(
            f"vLLM's model runner V2 zeroes new blocks of this KV cache (its groups differ in precision) before copies "
            f"of them can be waited for. Set VLLM_USE_V2_MODEL_RUNNER=0. {REMEDY}"
        )
    draft = vllm_config.speculative_config
    drops = draft is not None and draft.use_eagle_block_drop()
    annotated = any(group.is_eagle_group for group in kv_cache_config.kv_cache_groups)
    groups = []
    for index, group in enumerate(kv_cache_config.kv_cache_groups):
        if not group.enable_kv_transfer or not group.kv_cache_spec.prefix_cacheable:
            kind = get_kv_cache_spec_kind(group.kv_cache_spec).value
            raise UnsupportedError(f"KV cache group {index} of kind {kind} cannot be kept by its hashes. {REMEDY}")
        # Where no group is marked, vLLM drops the last block of every group.
        eagle = drops and (group.is_eagle_group or not annotated)
        groups.append(_group(index, group.kv_cache_spec, eagle))
    hit_tokens, hash_tokens = resolve_kv_cache_block_sizes(kv_cache_config, vllm_config)
    return Groups(tuple(groups), hash_tokens, hit_tokens)
