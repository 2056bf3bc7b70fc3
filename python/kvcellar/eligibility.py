"""Which models and settings have a KV cache that can be kept: one that depends on the prefix alone.

vLLM asks a connector for hits even where it does not reuse KV itself. Where it has a reason not to, a hit of ours would
end the engine or give wrong tokens.
"""

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import KVCacheConfig, iter_layer_specs
from vllm.v1.request import Request

from kvcellar import UnsupportedError
from kvcellar._native import Config

# Pooling over all tokens of a prompt: vLLM refuses to prefill a part of it.
_WHOLE_PROMPT_POOLING = ("MEAN", "CLS", "STEP")
# KV cache specs of these names keep what is not a function of the prefix: the window of R-SWA moves
# over generated tokens only.
_SPECS_NOT_OF_THE_PREFIX = ("RSWASpec",)


# Settings with which vLLM may unmap its KV cache, in the order in which they are told.
_UNMAPPING = {"enable_sleep_mode": "--enable-sleep-mode", "enable_cumem_allocator": "--enable-cumem-allocator"}


def refuse_sleep_mode(vllm_config: VllmConfig) -> None:
    """Sleeping unmaps or moves the KV cache, whose addresses the copy workers hold.

    vLLM also lets go of a KV cache that lies in memory of its cumem allocator, without sleep mode.

    Raises:
        UnsupportedError: the KV cache may be unmapped.
    """
    model = vllm_config.model_config
    for name, flag in _UNMAPPING.items():
        if model is not None and getattr(model, name, False):
            raise UnsupportedError(
                f"{flag} is not supported: vLLM may unmap the KV cache under running copies. Leave it out, or serve "
                "without KV Cellar"
            )


def why_nothing_is_kept(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, config: Config) -> str | None:
    """Why this engine is served without KV Cellar; None: its KV can be kept."""
    return (
        _whole_prompts(vllm_config)
        or _diffusion(vllm_config)
        or _degraded_steps(vllm_config)
        or _not_of_the_prefix(kv_cache_config)
        or _without_prefix_caching(vllm_config, config)
    )


def _whole_prompts(vllm_config: VllmConfig) -> str | None:
    pooler = getattr(vllm_config.model_config, "pooler_config", None)
    kinds = {str(getattr(pooler, name, None) or "").upper() for name in ("seq_pooling_type", "tok_pooling_type")}
    whole = sorted(kinds & set(_WHOLE_PROMPT_POOLING))
    return f"{'/'.join(whole)} pooling needs every prompt computed whole" if whole else None


def _diffusion(vllm_config: VllmConfig) -> str | None:
    if getattr(vllm_config, "diffusion_config", None) is None:
        return None
    return "a diffusion model may accept tokens whose KV no causal pass has written"


def _degraded_steps(vllm_config: VllmConfig) -> str | None:
    if not getattr(vllm_config.parallel_config, "enable_fault_tolerance", False):
        return None
    return "--enable-fault-tolerance lets steps go on without the experts of ranks that failed, which changes KV"


def _not_of_the_prefix(kv_cache_config: KVCacheConfig) -> str | None:
    for index, group in enumerate(kv_cache_config.kv_cache_groups):
        for spec in iter_layer_specs(group.kv_cache_spec):
            names = {base.__name__ for base in type(spec).__mro__}
            if names & set(_SPECS_NOT_OF_THE_PREFIX):
                return f"KV cache group {index} ({type(spec).__name__}) does not depend on the prefix alone"
            if getattr(spec, "non_causal", False) or getattr(spec, "non_causal_multi_token_decode", False):
                return f"KV cache group {index} belongs to non-causal attention, whose KV depends on later tokens, too"
    return None


def _without_prefix_caching(vllm_config: VllmConfig, config: Config) -> str | None:
    if vllm_config.cache_config.enable_prefix_caching:
        return None
    if not getattr(vllm_config.model_config, "is_prefix_caching_supported", True):
        return "vLLM does not reuse the KV of this model (it has turned prefix caching off)"
    if config.without_prefix_caching:
        return None
    return (
        'prefix caching is off (--no-enable-prefix-caching). Write "without_prefix_caching": true into '
        "kv_connector_extra_config to keep KV all the same"
    )


def has_numbered_media(vllm_config: VllmConfig, request: Request) -> bool:
    """Whether the media of a request are named by a counter, which starts anew with every process.

    vLLM does not hash media when prefix caching and the processor's cache are both off.
    """
    if not request.mm_features or vllm_config.cache_config.enable_prefix_caching:
        return False
    multimodal = getattr(vllm_config.model_config, "multimodal_config", None)
    return getattr(multimodal, "mm_processor_cache_gb", 0) == 0
