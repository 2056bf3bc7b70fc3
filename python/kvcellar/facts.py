"""Everything that makes KV bytes interchangeable: the facts behind a namespace."""

import json
import os
from pathlib import Path

from vllm.config import VllmConfig

from kvcellar.metadata import RankOffer
from kvcellar.window import check, vllm_version

_WEIGHT_ENDINGS = (".safetensors", ".bin", ".pt", ".gguf", ".json")
_RANDOM_SEED_HASHES = ("xxhash",)


def machine() -> str:
    """Identify this machine: equal for all processes on it since it booted."""
    return f"{os.uname().nodename}/{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"


def weights(model: str, revision: str | None) -> object:
    """Tell one set of weights from another without reading them.

    A local folder: name, size and time of each of its files. A hub model: the commit its files were fetched at, as
    far as
    the local cache knows it; else the revision as written.
    """
    folder = Path(model)
    if folder.is_dir():
        files = sorted(path for path in folder.iterdir() if path.suffix in _WEIGHT_ENDINGS)
        return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    if folder.is_file():
        return [(folder.name, folder.stat().st_size, folder.stat().st_mtime_ns)]
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else revision


def collect(vllm_config: VllmConfig, offers: list[RankOffer]) -> str:
    """The facts as JSON, for the native engine to take the fingerprint of."""
    model = vllm_config.model_config
    cache = vllm_config.cache_config
    parallel = vllm_config.parallel_config
    major, minor = check(vllm_version())
    load_format = str(vllm_config.load_config.load_format)
    facts = {
        "model": model.model,
        "weights": weights(model.model, model.revision),
        "load_format": load_format,
        # Random weights are made from the seed.
        "seed": model.seed if "dummy" in load_format else None,
        "overrides": repr(model.hf_overrides),
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "kv_cache_dtype": str(cache.cache_dtype),
        "max_model_len_scaling": repr(getattr(model.hf_config, "rope_parameters", None)),
        "tensor_parallel": parallel.tensor_parallel_size,
        "pipeline_parallel": parallel.pipeline_parallel_size,
        "layout": sorted({offer.layout for offer in offers}),
        "isa": sorted({offer.isa for offer in offers}),
        "block_bytes": [offer.block_bytes for offer in offers],
        "attention": repr(getattr(vllm_config.attention_config, "backend", None)),
        "hash": str(cache.prefix_caching_hash_algo),
        "hash_seed": os.environ.get("PYTHONHASHSEED"),
        "vllm": f"{major}.{minor}",
    }
    return json.dumps(facts, sort_keys=True)


def hashes_are_stable(vllm_config: VllmConfig) -> bool:
    """Whether block hashes mean the same after a restart."""
    algorithm = str(vllm_config.cache_config.prefix_caching_hash_algo)
    return not algorithm.startswith(_RANDOM_SEED_HASHES) or "PYTHONHASHSEED" in os.environ
