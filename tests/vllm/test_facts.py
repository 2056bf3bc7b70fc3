"""What makes another namespace and what does not, on vLLM's real configuration: one row a change."""

import copy
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.deadlines import deadline
from tests.vllm import tiny_models
from tests.vllm.engines import environment

pytestmark = pytest.mark.usefixtures("vllm_installed")

BASE = {"max_model_len": 512, "block_size": 16, "kv_cache_memory_bytes": 1 << 26, "seed": 0}


@dataclasses.dataclass(frozen=True)
class Row:
    """A change and whether KV is another one after it.

    Attributes:
        name: what was changed.
        differs: whether the facts must differ.
        arguments: of vLLM's engine, in the place of those of the base.
        model: made from the base's folder, in a new one.
        env: of the engine's processes.
        tweak: something that no argument changes.
        base: further arguments of *both* sides.
        before: a tweak of the side before the change.
    """

    name: str
    differs: bool
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    model: Callable[[Path], None] | None = None
    env: dict[str, str] = dataclasses.field(default_factory=dict)
    tweak: Callable[[Any], None] | None = None
    base: dict[str, Any] = dataclasses.field(default_factory=dict)
    before: Callable[[Any], None] | None = None


def config_of(arguments: dict[str, Any]) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(**arguments).create_engine_config()


def facts_of(config: Any, **offered: Any) -> dict[str, Any]:
    """The facts, without what is for people only, and without doubts. `offered`: what its rank says."""
    from kvcellar import facts
    from kvcellar.metadata import RankOffer

    found = facts.identify(config, [RankOffer("here", "LBHNC", "avx2", (4096,), **offered)])
    assert found.doubts == (), found.doubts
    told = json.loads(found.text)
    del told["model"]
    return told


def transfer(name: str, extra: dict[str, object], **more: object) -> dict[str, Any]:
    from vllm.config import KVTransferConfig

    settings = {"kv_connector": name, "kv_role": "kv_both", "kv_connector_extra_config": extra, **more}
    return {"kv_transfer_config": KVTransferConfig(**settings)}  # type: ignore[arg-type]


def ours(**extra: object) -> dict[str, Any]:
    return transfer("KVCellarConnector", extra)


def edit_config(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def touch(folder: Path) -> None:
    for path in folder.iterdir():
        os.utime(path, ns=(1, 1))


def change_a_tensor(folder: Path) -> None:
    """Other values in the middle of the file; its size and table stay."""
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 512] = bytes(255 - byte for byte in content[middle : middle + 512])
    path.write_bytes(content)


def write(name: str, content: str) -> Callable[[Path], None]:
    def add(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)

    return add


def rename_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")


def set_on(path: str, value: object) -> Callable[[Any], None]:
    """Sets a field that no argument reaches."""

    def tweak(config: Any) -> None:
        *parents, name = path.split(".")
        for parent in parents:
            config = getattr(config, parent)
        object.__setattr__(config, name, value)

    return tweak


def new_field(config: Any) -> None:
    """A later vLLM's cache has a field that nobody here has heard of."""
    fields = [("brand_new", str, dataclasses.field(default="on"))]
    later = dataclasses.make_dataclass("CacheConfig", fields, bases=(type(config.cache_config),))
    fresh = copy.copy(config.cache_config)
    object.__setattr__(fresh, "__class__", later)
    object.__setattr__(fresh, "brand_new", "on")
    object.__setattr__(config, "cache_config", fresh)


def media(**settings: Any) -> Callable[[Any], None]:
    """A vision model's settings, as vLLM makes them of its arguments."""

    def tweak(config: Any) -> None:
        from vllm.config import MultiModalConfig

        set_on("model_config.multimodal_config", MultiModalConfig(**settings))(config)

    return tweak


US = {"kv_connector": "KVCellarConnector", "kv_role": "kv_both"}
DUMMY = {"load_format": "dummy"}
LORA = {"enable_lora": True, "max_lora_rank": 8}
NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3, "prompt_lookup_min": 2}

ROWS = [
    # -- must differ -------------------------------------------------------------------------------
    Row("max_model_len", True, {"max_model_len": 256}),
    Row("max_model_len fitted to memory", True, {"max_model_len": -1}),
    Row("dtype", True, {"dtype": "float32"}),
    Row("block size", True, {"block_size": 32}),
    Row("kv cache dtype", True, {"kv_cache_dtype": "fp8_e5m2"}, base={"dtype": "bfloat16"}),
    Row("tensor parallel", True, {"tensor_parallel_size": 2}),
    Row("pipeline parallel", True, tweak=set_on("parallel_config.pipeline_parallel_size", 2)),
    Row("expert parallel", True, tweak=set_on("parallel_config.enable_expert_parallel", True)),
    Row("hash algorithm", True, {"prefix_caching_hash_algo": "sha256_cbor"}),
    Row("hash seed", True, env={"PYTHONHASHSEED": "7"}),
    Row("quantization", True, tweak=set_on("model_config.quantization", "fp8")),
    Row("hf overrides", True, {"hf_overrides": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}}),
    Row("attention backend", True, tweak=set_on("attention_config.backend", "FLASH_ATTN")),
    Row("sliding window off", True, {"disable_sliding_window": True}),
    Row("hybrid manager off", True, {"disable_hybrid_kv_cache_manager": True}),
    Row("compiled or eager", True, {"enforce_eager": True}),
    Row("custom ops", True, {"compilation_config": {"custom_ops": ["+rms_norm"]}}),
    Row("model implementation", True, {"model_impl": "transformers"}),
    Row("LoRA layers", True, LORA),
    Row("LoRA dtype", True, {"lora_dtype": "float16"}, base=LORA),
    Row("speculative decoding", True, {"speculative_config": NGRAM}),
    Row("seed of dummy weights", True, {"seed": 1}, base=DUMMY),
    Row("dummy weights", True, DUMMY),
    Row("load format", True, {"load_format": "safetensors"}),
    Row("another connector", True, transfer("ExampleConnector", {"shared_storage_path": "a"})),
    Row("environment: numerics", True, env={"VLLM_BATCH_INVARIANT": "1"}),
    Row("environment: float32 products", True, env={"NVIDIA_TF32_OVERRIDE": "1"}),
    Row("environment: an unknown variable of vLLM", True, env={"VLLM_BRAND_NEW": "1"}),
    Row("additional config", True, {"additional_config": {"fuse": True}}),
    Row("a field that a new vLLM brings", True, tweak=new_field),
    Row("model config: rope", True, model=edit_config(rope_parameters={"rope_type": "default", "rope_theta": 7.0})),
    Row("model config: norm", True, model=edit_config(rms_norm_eps=0.01)),
    Row("a tensor's values", True, model=change_a_tensor),
    Row("weights' names", True, model=rename_weights),
    Row("quantization file", True, model=write("quantize_config.json", '{"bits": 4}')),
    Row("custom code", True, model=write("modeling_own.py", "SCALE = 2\n")),
    Row("mm_processor_kwargs", True, tweak=media(mm_processor_kwargs={"max_pixels": 3136}), before=media()),
    Row("media_io_kwargs", True, tweak=media(media_io_kwargs={"video": {"num_frames": 4}}), before=media()),
    Row("video_pruning_rate", True, tweak=media(video_pruning_rate=0.5), before=media()),
    Row("image processor", True, tweak=set_on("model_config.hf_image_processor_config", {"max_pixels": 1})),
    Row("image processor's file", True, model=write("preprocessor_config.json", '{"max_pixels": 1}')),
    Row("encoder attention", True, tweak=media(mm_encoder_attn_backend="TORCH_SDPA"), before=media()),
    Row("encoder on every rank", True, tweak=media(mm_encoder_tp_mode="data"), before=media()),
    # -- must stay equal ---------------------------------------------------------------------------
    Row("nothing", False),
    Row("a copy", False, model=lambda folder: None),
    Row("time stamps", False, model=touch),
    Row("generation config", False, model=write("generation_config.json", '{"temperature": 0.1}')),
    Row("tokenizer", False, model=write("tokenizer_config.json", '{"model_max_length": 77}')),
    Row("chat template", False, model=write("chat_template.jinja", "{{ messages }}")),
    Row("read me", False, model=write("README.md", "# Read me")),
    Row("a training checkpoint", False, model=write("checkpoint-100/optimizer.pt", "x")),
    Row("max_model_len, as derived", False, {"max_model_len": 2048}, base={"max_model_len": None}),
    Row("served name", False, {"served_model_name": ["other"]}),
    Row("seed", False, {"seed": 5}),
    Row("memory utilization", False, {"gpu_memory_utilization": 0.5}),
    Row("KV cache bytes", False, {"kv_cache_memory_bytes": 1 << 27}),
    Row("KV cache blocks", False, {"num_gpu_blocks_override": 77}),
    Row("blocks that vLLM made of it", False, tweak=set_on("cache_config.num_gpu_blocks", 123)),
    Row("room in vLLM's CPU cache", False, env={"VLLM_CPU_KVCACHE_SPACE": "2"}),
    Row("max_num_seqs", False, {"max_num_seqs": 3}),
    Row("max_num_batched_tokens", False, {"max_num_batched_tokens": 1024}),
    Row("policy", False, {"scheduling_policy": "priority"}),
    Row("async scheduling", False, {"async_scheduling": False}),
    Row("logging", False, env={"VLLM_LOGGING_LEVEL": "DEBUG", "VLLM_LOG_STATS_INTERVAL": "1"}),
    Row("statistics", False, {"disable_log_stats": True}),
    Row("ports", False, tweak=set_on("parallel_config.data_parallel_master_port", 40404)),
    Row("data-parallel rank", False, tweak=set_on("parallel_config.data_parallel_index", 1)),
    Row("executor", False, {"distributed_executor_backend": "uni"}),
    Row("our own sizes", False, ours(dram_size="2GiB", keep_pool=False), base=ours(dram_size="1GiB")),
    Row("us or nobody", False, ours()),
    Row(
        "us beside nobody",
        False,
        transfer("MultiConnector", {"connectors": [US]}),
    ),
    Row("tokenizer's mode", False, {"tokenizer_mode": "slow"}),
    Row("limits of media", False, tweak=media(limit_per_prompt={"image": {"count": 2}}), before=media()),
    Row("media cache", False, tweak=media(mm_processor_cache_gb=1.0), before=media()),
    Row("adapters at a time", False, {"max_loras": 3, "max_cpu_loras": 5}, base=LORA),
    Row("an API key", False, env={"VLLM_API_KEY": "secret"}),
]


@pytest.fixture(scope="module")
def llama(vllm_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.llama(tmp_path_factory.mktemp("facts") / "llama")


@pytest.fixture(autouse=True)
def _as_if_the_files_were_there_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests write models within their own process; an engine's process starts after that."""
    monkeypatch.setattr("kvcellar.weights.process_start_ns", lambda: 1 << 62)


# Configurations that many rows begin with: vLLM takes seconds to make one.
_bases: dict[str, Any] = {}


def before_of(row: Row, model: Path) -> dict[str, Any]:
    arguments = {**BASE, **row.base, "model": str(model)}
    if repr(arguments) not in _bases:
        _bases[repr(arguments)] = config_of(arguments)
    config = copy.deepcopy(_bases[repr(arguments)])
    if row.before is not None:
        row.before(config)
    return facts_of(config)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_change(row: Row, llama: Path, tmp_path: Path) -> None:
    before = before_of(row, llama)
    model = llama
    if row.model is not None:
        model = tmp_path / "elsewhere" / "model"
        shutil.copytree(llama, model)
        row.model(model)
    with environment(row.env):
        config = config_of({**BASE, **row.base, **row.arguments, "model": str(model)})
        if row.tweak is not None:
            row.tweak(config)
        after = facts_of(config)
    changed = [name for name, part in after["parts"].items() if before["parts"].get(name) != part]
    assert (before != after) is row.differs, f"{row.name}: {changed} changed"


def test_the_table_is_long_enough() -> None:
    assert len(ROWS) >= 40 and len({row.name for row in ROWS}) == len(ROWS)


def test_how_ranks_share_the_tokens_of_a_block_counts(llama: Path) -> None:
    """Beside NIXL a worker changes it, and the configuration of EngineCore does not say so."""
    config = config_of({**BASE, "model": str(llama)})
    assert facts_of(config, interleave=1) != facts_of(config, interleave=16)


def test_every_neutral_field_has_a_reason_and_each_class_exists() -> None:
    from kvcellar.neutral import FIELDS, OTHERS_THAT_COUNT, VARIABLE_PREFIXES, VARIABLES
    from vllm import config

    for table in (FIELDS, VARIABLES, VARIABLE_PREFIXES, OTHERS_THAT_COUNT):
        assert all(len(reason.split()) >= 2 for reason in table.values())
    named = {name.partition(".")[0] for name in FIELDS} - {"PreTrainedConfig", "PretrainedConfig", "EPLBConfig"}
    assert [name for name in named if not hasattr(config, name)] == []


@pytest.mark.timeout(deadline(1200))
def test_two_processes_write_the_same_configuration_in_the_same_words(llama: Path) -> None:
    """Addresses, orders of sets and hashes of strings differ from process to process; the facts do not."""
    program = (
        "import sys; from tests.vllm.test_facts import BASE, config_of, facts_of\n"
        "from kvcellar import weights; weights.process_start_ns = lambda: 1 << 62\n"
        "if __name__ == '__main__': print(facts_of(config_of({**BASE, 'model': sys.argv[1]})))"
    )
    run = [sys.executable, "-c", program, str(llama)]
    both = [subprocess.Popen(run, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate()[0].splitlines()[-1] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert told[0] == told[1] and "parts" in told[0]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"load_format": "tensorizer"}, "load_format tensorizer"),
        ({"load_format": "modelexpress"}, "load_format modelexpress"),
    ],
    ids=["tensorizer", "modelexpress"],
)
def test_weights_that_cannot_be_looked_at_are_a_doubt_and_facts_of_this_start_alone(
    llama: Path, arguments: dict[str, Any], word: str
) -> None:
    from kvcellar import facts

    config = config_of({**BASE, "model": str(llama)})
    object.__setattr__(config.load_config, "load_format", arguments["load_format"])
    first, second = facts.identify(config, []), facts.identify(config, [])
    assert any(word in doubt for doubt in first.doubts)
    assert first.text != second.text, "nobody else may ever use these blocks"


def test_a_hub_model_that_is_not_in_the_cache_is_a_doubt(llama: Path) -> None:
    from kvcellar import weights

    config = config_of({**BASE, "model": str(llama)})
    object.__setattr__(config.model_config, "model", "nobody/nothing-like-this")
    found = weights.identify(config.model_config, config.load_config)
    assert found.digest is None and "not in the hub's cache" in (found.doubt or "")


def test_a_hub_model_is_told_by_what_lies_in_the_cache_also_in_mistrals_format(llama: Path, tmp_path: Path) -> None:
    """`download_dir`, a repository without config.json, and blobs that were downloaded just now."""
    from kvcellar import weights

    config = config_of({**BASE, "model": str(llama)})
    object.__setattr__(config.model_config, "model", "org/mistral-like")
    object.__setattr__(config.load_config, "download_dir", str(tmp_path))
    digests = []
    for commit, content in (("a" * 40, b"one"), ("b" * 40, b"two")):
        repo = tmp_path / "models--org--mistral-like"
        snapshot = repo / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (repo / "blobs").mkdir(exist_ok=True)
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / "main").write_text(commit)
        for name, blob in (("consolidated.safetensors", content), ("params.json", b"{}")):
            target = repo / "blobs" / f"{blob.hex()}"
            target.write_bytes(blob)
            (snapshot / name).symlink_to(os.path.relpath(target, snapshot))
        found = weights.identify(config.model_config, config.load_config)
        assert found.doubt is None
        digests.append(found.digest)
    assert digests[0] != digests[1] and None not in digests


def test_files_written_since_the_engine_started_are_a_doubt(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvcellar import facts

    config = config_of({**BASE, "model": str(llama)})
    monkeypatch.setattr("kvcellar.weights.process_start_ns", lambda: 0)
    assert any("written since this engine started" in doubt for doubt in facts.identify(config, []).doubts)


@pytest.fixture
def no_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a front end that has configured nothing yet."""
    from kvcellar.facts import STAMPS_VARIABLE

    monkeypatch.setenv(STAMPS_VARIABLE, "{}")


@pytest.mark.parametrize("how", ["a link that was turned", "a folder that was renamed"])
def test_a_model_that_was_exchanged_after_it_was_configured_is_a_doubt(
    llama: Path, tmp_path: Path, no_notes: None, how: str
) -> None:
    """The files of the other version are older than the engine: only their places tell."""
    from kvcellar import facts

    first, second, current = tmp_path / "v1", tmp_path / "v2", tmp_path / "current"
    for version in (first, second):
        shutil.copytree(llama, version)
    change_a_tensor(second)
    if how == "a link that was turned":
        current.symlink_to(first)
    else:
        first.rename(current)
    config = config_of({**BASE, **ours(dram_size="64MiB"), "model": str(current)})
    assert facts.identify(config, []).doubts == ()
    if current.is_symlink():
        current.unlink()
        current.symlink_to(second)
    else:
        current.rename(first)
        second.rename(current)
    (doubt,) = facts.identify(config, []).doubts
    assert "was exchanged" in doubt


def test_a_model_that_could_not_be_looked_at_before_it_was_loaded_is_a_doubt(
    llama: Path, no_notes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvcellar import facts

    def refused(*_: Any) -> Any:
        raise PermissionError("not yet")

    with monkeypatch.context() as patch:
        patch.setattr("kvcellar.weights._files", refused)
        config = config_of({**BASE, **ours(dram_size="64MiB"), "model": str(llama)})
    (doubt,) = facts.identify(config, []).doubts
    assert "was exchanged" in doubt


def test_files_that_settings_name_count_however_they_are_named(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvcellar import facts

    monkeypatch.chdir(tmp_path)
    config = config_of({**BASE, "model": str(llama)})
    object.__setattr__(config.load_config, "model_loader_extra_config", {"adapters": [{"path": "scales.json"}]})
    found = set()
    for content in ("one", "two"):
        Path("scales.json").write_text(content)
        found.add(json.dumps(facts.identify(config, []).details["weights"], sort_keys=True))
    assert len(found) == 2


def test_scales_that_follow_from_the_pictures_seen_are_a_doubt(llama: Path, tmp_path: Path) -> None:
    from types import SimpleNamespace

    from kvcellar import facts

    config = config_of({**BASE, "model": str(llama)})
    scales = tmp_path / "scales.json"
    for path, doubted in ((None, True), (str(scales), True), (str(scales), False)):
        if not doubted:
            scales.write_text("{}")
        media = SimpleNamespace(mm_encoder_attn_dtype="fp8", mm_encoder_fp8_scale_path=path)
        object.__setattr__(config.model_config, "multimodal_config", media)
        assert any("fp8" in doubt for doubt in facts.identify(config, []).doubts) is doubted, path


def test_a_tokenizer_that_shapes_pictures_counts(llama: Path, tmp_path: Path) -> None:
    from types import SimpleNamespace

    from kvcellar import facts

    config = config_of({**BASE, "model": str(llama)})
    object.__setattr__(config.model_config, "multimodal_config", SimpleNamespace())
    found = set()
    for place in ("one", "two"):
        folder = tmp_path / place
        folder.mkdir()
        (folder / "tekken.json").write_text(json.dumps({"image": {"max_image_size": len(found) + 1}}))
        object.__setattr__(config.model_config, "tokenizer", str(folder))
        found.add(json.dumps(facts.identify(config, []).details["media_tokenizer"]))
    assert len(found) == 2
    other = tmp_path / "model"
    shutil.copytree(llama, other)
    before = facts.identify(config_of({**BASE, "model": str(other)}), []).details["weights"]
    (other / "tekken.json").write_text("{}")
    assert facts.identify(config_of({**BASE, "model": str(other)}), []).details["weights"] != before


@pytest.mark.parametrize(
    ("part", "field", "value", "word"),
    [
        ("parallel_config", "enable_fault_tolerance", True, "fault-tolerance"),
        ("", "diffusion_config", object(), "diffusion"),
    ],
)
def test_engines_whose_kv_is_not_the_models_are_served_without_us(
    llama: Path, part: str, field: str, value: object, word: str
) -> None:
    from types import SimpleNamespace

    from kvcellar import eligibility
    from kvcellar._native import Config

    config: Any = config_of({**BASE, "model": str(llama)})
    groups: Any = SimpleNamespace(kv_cache_groups=[])
    settings = Config.parse("{}")
    assert eligibility.why_nothing_is_kept(config, groups, settings) is None
    object.__setattr__(getattr(config, part) if part else config, field, value)
    assert word in (eligibility.why_nothing_is_kept(config, groups, settings) or "")


@pytest.mark.parametrize("field", ["enable_sleep_mode", "enable_cumem_allocator"])
def test_a_kv_cache_that_vllm_may_unmap_is_refused(llama: Path, field: str) -> None:
    from kvcellar import UnsupportedError, eligibility

    config = config_of({**BASE, "model": str(llama)})
    eligibility.refuse_sleep_mode(config)
    object.__setattr__(config.model_config, field, True)
    with pytest.raises(UnsupportedError, match=field.replace("_", "-")):
        eligibility.refuse_sleep_mode(config)
