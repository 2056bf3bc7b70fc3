"""The identity of a model's weights: what lies in the folder that vLLM loaded, by content.

Promises: a copy, a fresh download and a `touch` keep the identity; other weights, another quantization file or other
custom code have another. Where the files that were loaded cannot be known, the identity is a doubt with its reason.
Does not hold what vLLM's configuration says of the model: that counts by itself (facts.py).
"""

import fnmatch
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vllm.config import LoadConfig, ModelConfig

from kvcellar.content import DIGEST_BYTES, ChangedError, Stamp, digest_files, process_start_ns

# Loaders that read files of a local folder or of a hub's cache.
FILE_LOADERS = frozenset(
    {
        "auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "mistral", "pt", "npcache", "bitsandbytes",
        "gguf", "sharded_state", "runai_streamer",
    }
)  # fmt: skip
WEIGHT_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
FILES_MAX = 20_000
_COMMIT = re.compile("[0-9a-f]{40}")
# Files of a model's folder that do not shape KV. A name that is not here counts.
NEUTRAL_FILES: dict[str, str] = {
    "generation_config.json": "how tokens are chosen from logits",
    "tokenizer*": "text and token ids; blocks are named by token ids",
    "vocab.*": "text and token ids",
    "merges.txt": "text and token ids",
    "added_tokens.json": "text and token ids",
    "special_tokens_map.json": "text and token ids",
    "spiece.model": "text and token ids",
    "*.tiktoken": "text and token ids",
    "chat_template*": "text of conversations",
    "*.jinja": "text of conversations",
    "*.md": "for readers",
    "*.txt": "for readers",
    "*.pdf": "for readers",
    "*.png": "for readers",
    "*.jpg": "for readers",
    "*.svg": "for readers",
    "LICENSE*": "for readers",
    "NOTICE*": "for readers",
    "USE_POLICY*": "for readers",
    "*.msgpack": "weights for other programs",
    "*.h5": "weights for other programs",
    "*.onnx*": "weights for other programs",
    "*.tflite": "weights for other programs",
    "training_args.bin": "left by training",
    "trainer_state.json": "left by training",
    "optimizer*": "left by training",
    "scheduler.pt": "left by training",
    "rng_state*": "left by training",
    "*.lock": "left by a download",
    "*.metadata": "left by a download",
    "*.incomplete": "left by a download",
}
# Folders in it.
NEUTRAL_FOLDERS: dict[str, str] = {
    ".*": "caches and version control",
    "__pycache__": "made of the code beside it",
    "checkpoint-*": "left by training",
    "runs": "left by training",
    "onnx": "weights for other programs",
}
# Parts of a model's configuration that name a second repository, whose files are loaded, too.
SECOND_MODELS = ("text_model_id", "audio_model_id")


@dataclass(frozen=True)
class Identity:
    """What is known of weights.

    Attributes:
        digest: hexadecimal, or `None` where it cannot be known.
        doubt: why it cannot be known, or why it may not be relied on.
    """

    digest: str | None
    doubt: str | None = None


def identify(model: ModelConfig, load: LoadConfig) -> Identity:
    """The identity of a model's weights, custom code and files that shape it."""
    loader = str(load.load_format)
    if loader == "dummy":
        # Random weights are made from the seed; custom code may lie in a folder all the same.
        folder = _folder(model, load)
        code = _digest(folder, load, "*.py") if isinstance(folder, Path) else Identity("")
        return Identity(f"dummy/{model.seed}/{code.digest}", code.doubt)
    unknown = next(_unknown(model, loader), None)
    folder = _folder(model, load) if unknown is None else unknown
    return _digest(folder, load) if isinstance(folder, Path) else Identity(None, folder)


def _unknown(model: ModelConfig, loader: str) -> Iterator[str]:
    """Why what is loaded is not, or not only, what lies in the model's folder."""
    if loader not in FILE_LOADERS:
        yield f"load_format {loader} does not read files that can be looked at"
    if getattr(model, "model_weights", ""):
        yield f"the weights come from {model.model_weights}"
    for name in SECOND_MODELS:
        if getattr(model.hf_config, name, None):
            yield f"the model loads a second one, which its {name} names"
    foreign = _foreign_code(model)
    if foreign is not None:
        yield f"the model's code lies in another repository, {foreign}"
    if model.code_revision is not None and not _COMMIT.fullmatch(model.code_revision):
        yield f"code_revision {model.code_revision} is no commit: what it names may change"


def of_path(path: Path) -> Identity:
    """The identity of a file or folder that a configuration names."""
    return _digest(path, None)


def stamps(model: ModelConfig, load: LoadConfig) -> str | None:
    """What the entries of a model's local folder say now; `None` for a model of a hub.

    Compared with the same of later: a folder that was exchanged holds files that may be older than this engine.
    A folder that cannot be read has a stamp of its own, which differs from that of any other.
    """
    local = Path(model.model)
    if not local.exists():
        return None
    try:
        folder = local.resolve()
        place = folder.stat()
        files = [] if folder.is_file() else sorted(_files(folder, load))
        entries = [(name, Stamp.of(path.stat())) for name, path in files]
    except OSError as error:
        return f"unreadable: {type(error).__name__}"
    seen = repr((str(folder), place.st_dev, place.st_ino, entries))
    return hashlib.blake2b(seen.encode(), digest_size=DIGEST_BYTES).hexdigest()


def _foreign_code(model: ModelConfig) -> str | None:
    """The repository of custom code that does not lie with the weights."""
    entries = (getattr(model.hf_config, "auto_map", None) or {}).values() if model.trust_remote_code else ()
    flat = [part for entry in entries for part in (entry if isinstance(entry, list | tuple) else [entry])]
    named = {part.partition("--")[0] for part in flat if isinstance(part, str) and "--" in part}
    return next(iter(sorted(named - {model.model})), None)


def _folder(model: ModelConfig, load: LoadConfig) -> Path | str:
    """Where the loader read, or why that is not known."""
    local = Path(model.model)
    if local.exists():
        return local
    if os.environ.get("VLLM_USE_MODELSCOPE", "0").lower() in ("1", "true"):
        return _modelscope(model, load)
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            model.model, revision=model.revision, cache_dir=load.download_dir, local_files_only=True
        )
    except (OSError, ValueError) as error:
        return f"{model.model} is not in the hub's cache ({type(error).__name__})"
    commit = getattr(model.hf_config, "_commit_hash", None)
    if commit is not None and commit != Path(found).name and model.hf_config_path in (None, model.model):
        return f"{model.model} was downloaded anew while the engine started"
    return Path(found)


def _modelscope(model: ModelConfig, load: LoadConfig) -> Path | str:
    try:
        from modelscope.hub.snapshot_download import snapshot_download

        found = snapshot_download(
            model_id=model.model, cache_dir=load.download_dir, revision=model.revision, local_files_only=True
        )
    except (ImportError, OSError, ValueError, TypeError) as error:
        return f"{model.model} is not in ModelScope's cache ({type(error).__name__})"
    return Path(found)


def _digest(folder: Path, load: LoadConfig | None, only: str = "*") -> Identity:
    try:
        began_ns = process_start_ns()
        files = [(folder.name, folder)] if folder.is_file() else list(_files(folder, load))
        files = [(name, path) for name, path in files if fnmatch.fnmatch(path.name, only)]
        if len(files) > FILES_MAX:
            return Identity(None, f"{folder} holds more than {FILES_MAX} files")
        if load is not None and only == "*" and not any(path.name.endswith(WEIGHT_ENDINGS) for _, path in files):
            return Identity(None, f"{folder} holds no weights")
        digest = digest_files(files).hex()
        fresh = next((name for name, path in files if _is_fresh(path, began_ns)), None)
    except (OSError, ChangedError, ValueError) as error:
        return Identity(None, f"{folder} cannot be read: {error}")
    doubt = f"{folder / fresh} was written since this engine started, perhaps after it was loaded" if fresh else None
    return Identity(digest, doubt)


def _files(folder: Path, load: LoadConfig | None) -> Iterator[tuple[str, Path]]:
    """Names and paths of what counts in a folder."""
    ignored = load.ignore_patterns or [] if load is not None else []
    ignored = [ignored] if isinstance(ignored, str) else ignored
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not matches(name, NEUTRAL_FOLDERS)]
        for name in names:
            path = Path(parent, name)
            relative = path.relative_to(folder).as_posix()
            if not matches(name, NEUTRAL_FILES) and not matches(relative, ignored) and not name.startswith("."):
                yield f"{relative}{_blob(path)}", path


def _blob(path: Path) -> str:
    """A hub's name of a file's whole content, where it has one: more than a sample says."""
    target = path.resolve() if path.is_symlink() else path
    return f"@{target.name}" if target.parent.name == "blobs" else ""


def matches(name: str, patterns: dict[str, str] | list[str]) -> bool:
    """Whether a name fits one of the patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _is_fresh(path: Path, since_ns: int) -> bool:
    """Whether a file was written since then. A hub's blobs are named by content and never written again."""
    return not _blob(path) and Stamp.of(path.stat()).changed_ns > since_ns
