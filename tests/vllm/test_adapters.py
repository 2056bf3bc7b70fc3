"""The identity of LoRA adapters: what vLLM's own loading really read, and what the files hold now."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.vllm import tiny_models

pytestmark = pytest.mark.usefixtures("vllm_installed")

NAME, NUMBER = "sql", 1


@pytest.fixture(scope="module")
def model(vllm_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.llama(tmp_path_factory.mktemp("adapters") / "llama")


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    return _settled(tiny_models.adapter(tmp_path / "adapter", model, seed=1))


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A worker's notes, looking on at vLLM's own class."""
    from kvcellar import adapters
    from vllm.lora.worker_manager import WorkerLoRAManager

    monkeypatch.setattr(WorkerLoRAManager, "_load_adapter", WorkerLoRAManager._load_adapter)
    fresh = adapters.Loads()
    fresh.observe()
    return fresh


def _settled(folder: Path) -> Path:
    """As after a while: time stamps that a later write cannot repeat."""
    for path in folder.iterdir():
        os.utime(path)
    return folder


def request(folder: Path, **more: Any) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(NAME, NUMBER, str(folder), **more)


def manager() -> Any:
    """vLLM's own manager of a worker, with just enough around it to load an adapter from its files."""
    import torch
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

    made = object.__new__(LRUCacheWorkerLoRAManager)
    made._lora_model_cls = LoRAModel
    made.max_position_embeddings = 2048
    made.vocab_size = tiny_models.VOCABULARY
    made.lora_config = SimpleNamespace(
        max_lora_rank=8, lora_dtype=torch.float32, bias_enabled=False, max_lora_cls_labels=0
    )
    made._adapter_manager = SimpleNamespace(
        supported_lora_modules=["q_proj", "k_proj", "v_proj"],
        packed_modules_mapping={},
        model=SimpleNamespace(),
        moe_ep_load_spec=None,
        _validate_moe_lora_format=lambda lora: None,
        _validate_modules_to_save=lambda lora: None,
        _validate_token_classification_lora=lambda lora: None,
    )
    return made


def load(worker: Any, folder: Path) -> bytes:
    """Loads with vLLM's code; returns a tensor's bytes, to see which adapter it was."""
    lora = worker._load_adapter(request(folder))
    weights = lora.loras[min(lora.loras)]
    return bytes(weights.lora_a.contiguous().numpy().tobytes())


def scheduler(*reports: Any, ranks: int = 1) -> Any:
    from kvcellar.adapters import Adapters

    made = Adapters(ranks)
    for report in reports:
        made.confirm(report)
    return made


def test_equal_files_are_one_adapter_wherever_they_lie_and_whenever_they_came(folder: Path, tmp_path: Path) -> None:
    from kvcellar.adapters import digest

    copied = tmp_path / "copy"
    shutil.copytree(folder, copied)
    os.utime(copied / "adapter_model.safetensors", ns=(5, 5))
    found = digest(str(folder))
    assert found is not None and len(found) == 16
    assert digest(str(copied)) == found


@pytest.mark.parametrize("change", ["tensors", "scale", "one byte, old time stamps"])
def test_other_files_are_another_adapter(folder: Path, model: Path, change: str) -> None:
    from kvcellar.adapters import digest

    before = digest(str(folder))
    weights, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if change == "tensors":
        tiny_models.adapter(folder, model, seed=2)
    elif change == "scale":
        settings.write_text(settings.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))
    else:
        times, content = weights.stat(), bytearray(weights.read_bytes())
        content[len(content) // 2] ^= 1
        weights.write_bytes(content)
        os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert digest(str(folder)) not in (before, None)


def test_what_is_no_adapter_has_no_identity(tmp_path: Path) -> None:
    from kvcellar.adapters import digest

    assert digest(str(tmp_path / "nowhere")) is None
    assert digest("nobody/nothing-like-this") is None
    assert digest(str(tmp_path)) is None, "an empty folder"


def test_an_adapter_has_its_files_identity_once_every_rank_has_loaded_them(folder: Path, loads: Any) -> None:
    from kvcellar.adapters import BASE, NOT_YET, Adapters, digest

    adapters = Adapters(2)
    assert adapters.identity(None) == BASE
    assert adapters.identity(request(folder)) == NOT_YET
    worker = manager()
    load(worker, folder)
    first = loads.take_report(0, 1)
    adapters.confirm(first)
    assert adapters.identity(request(folder)) == NOT_YET, "one of two ranks"
    adapters.confirm(type(first)({1: first.ranks[0]}))
    assert adapters.identity(request(folder)) == digest(str(folder))
    assert loads.take_report(0, 1) is None, "nothing is new"


def test_workers_that_never_report_do_not_make_requests_wait_for_ever(folder: Path) -> None:
    from kvcellar.adapters import ASKS_MAX, NOT_YET

    adapters = scheduler(ranks=1)
    assert {adapters.identity(request(folder)) for _ in range(ASKS_MAX)} == {NOT_YET}
    assert adapters.identity(request(folder)) is None


def test_files_that_are_read_in_another_form_are_another_adapter(folder: Path) -> None:
    from kvcellar.adapters import of_request

    assert of_request(request(folder)) != of_request(request(folder, is_3d_lora_weight=True))


def test_a_first_report_comes_although_nothing_was_loaded(folder: Path, loads: Any) -> None:
    adapters = scheduler(loads.take_report(0, 1))
    assert adapters.identity(request(folder)) is None


def test_files_that_were_exchanged_after_loading_are_a_doubt_until_they_are_loaded(
    folder: Path, model: Path, loads: Any
) -> None:
    worker = manager()
    old = load(worker, folder)
    adapters = scheduler(loads.take_report(0, 1))
    before = adapters.identity(request(folder))
    tiny_models.adapter(folder, model, seed=2)
    assert adapters.identity(request(folder)) is None, "the old one is loaded, the new one lies there"
    assert load(worker, folder) != old
    assert adapters.confirm(loads.take_report(0, 1)) == {NUMBER}, "what was stored since may be of either"
    after = adapters.identity(request(folder))
    assert after not in (before, None)


def test_a_name_under_which_two_were_loaded_is_mixed_and_stays_so(folder: Path, model: Path, loads: Any) -> None:
    worker = manager()
    load(worker, folder)
    adapters = scheduler(loads.take_report(0, 1))
    adapters.identity(request(folder))
    load(worker, folder)
    adapters.confirm(loads.take_report(0, 2))
    assert not adapters.is_mixed(request(folder)), "the same again"
    tiny_models.adapter(folder, model, seed=2)
    load(worker, folder)
    adapters.confirm(loads.take_report(0, 3))
    assert adapters.is_mixed(request(folder))
    tiny_models.adapter(folder, model, seed=1)
    load(worker, folder)
    adapters.confirm(loads.take_report(0, 4))
    assert adapters.is_mixed(request(folder)), "vLLM may still have blocks of the second one"


def test_one_name_for_two_numbers_is_mixed_where_they_differ(folder: Path, model: Path, tmp_path: Path) -> None:
    from kvcellar.adapters import AdapterReport, Adapters, RankLoads
    from vllm.lora.request import LoRARequest

    def reported(second: bytes) -> Any:
        adapters = Adapters(1)
        adapters.confirm(AdapterReport({0: RankLoads(0, {NUMBER: b"a" * 16, NUMBER + 1: second})}))
        for number in (NUMBER, NUMBER + 1):
            adapters.identity(LoRARequest(NAME, number, str(folder)))
        return adapters

    assert not reported(b"a" * 16).is_mixed(request(folder))
    assert reported(b"b" * 16).is_mixed(request(folder))


def test_loading_the_same_again_contradicts_nobody(folder: Path, loads: Any) -> None:
    worker = manager()
    load(worker, folder)
    adapters = scheduler(loads.take_report(0, 1))
    before = adapters.identity(request(folder))
    load(worker, folder)
    assert adapters.confirm(loads.take_report(0, 1)) == frozenset()
    assert adapters.identity(request(folder)) == before


def test_ranks_that_loaded_different_files_are_a_doubt(folder: Path, model: Path, loads: Any) -> None:
    from kvcellar.adapters import AdapterReport

    worker = manager()
    load(worker, folder)
    first = loads.take_report(0, 1)
    tiny_models.adapter(folder, model, seed=2)
    load(worker, folder)
    adapters = scheduler(first, AdapterReport({1: loads.take_report(0, 1).ranks[0]}), ranks=2)
    assert adapters.identity(request(folder)) is None


def test_files_exchanged_while_they_are_loaded_are_a_doubt(
    folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvcellar import adapters
    from vllm.lora.worker_manager import WorkerLoRAManager

    original = WorkerLoRAManager._load_adapter

    def slow(manager: Any, lora_request: Any) -> Any:
        loaded = original(manager, lora_request)
        tiny_models.adapter(folder, model, seed=3)
        return loaded

    monkeypatch.setattr(WorkerLoRAManager, "_load_adapter", slow)
    loads = adapters.Loads()
    loads.observe()
    worker = manager()
    load(worker, folder)
    assert loads.take_report(0, 1).ranks[0].loaded == {NUMBER: None}


def test_files_that_cannot_be_loaded_are_a_doubt_and_vllm_sees_its_own_error(folder: Path, loads: Any) -> None:
    from vllm.lora.worker_manager import WorkerLoRAManager

    worker = manager()
    load(worker, folder)
    adapters = scheduler(loads.take_report(0, 1))
    (folder / "adapter_model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(Exception, match=r"(?i)header|safetensors|deserializ"):
        load(worker, folder)
    assert loads.take_report(0, 2) is None, "the old one is still loaded"
    assert adapters.identity(request(folder)) is None
    assert WorkerLoRAManager._load_adapter is loads._installed


def test_adapters_that_come_from_memory_are_a_doubt(folder: Path) -> None:
    from kvcellar.adapters import of_request
    from vllm.lora.request import LoRARequest

    class FromMemory(LoRARequest):
        lora_tensors: dict[str, Any] | None = None

    assert of_request(request(folder)) is not None
    assert of_request(FromMemory(NAME, NUMBER, str(folder))) is None


def test_looking_on_twice_is_looking_on_once(loads: Any) -> None:
    from vllm.lora.worker_manager import WorkerLoRAManager

    before = WorkerLoRAManager._load_adapter
    loads.observe()
    loads.observe()
    assert WorkerLoRAManager._load_adapter is before


def test_who_puts_a_loader_of_his_own_in_our_place_voids_what_was_noted(
    folder: Path, loads: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.lora.worker_manager import WorkerLoRAManager

    worker = manager()
    load(worker, folder)
    adapters = scheduler(loads.take_report(0, 1))
    assert isinstance(adapters.identity(request(folder)), bytes)
    monkeypatch.setattr(WorkerLoRAManager, "_load_adapter", lambda manager, lora_request: "theirs")
    assert worker._load_adapter(request(folder)) == "theirs"
    assert adapters.confirm(loads.take_report(0, 1)) == {NUMBER}
    assert adapters.identity(request(folder)) is None


def test_a_vllm_without_that_function_leaves_every_adapter_in_doubt(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvcellar import adapters
    from vllm.lora.worker_manager import WorkerLoRAManager

    monkeypatch.delattr(WorkerLoRAManager, "_load_adapter")
    loads = adapters.Loads()
    loads.observe()
    assert scheduler(loads.take_report(0, 1)).identity(request(folder)) is None
    assert not hasattr(WorkerLoRAManager, "_load_adapter")


def test_a_fault_of_ours_while_looking_on_does_not_reach_vllm(
    folder: Path, loads: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(request: Any) -> bytes:
        raise RuntimeError("a bug")

    monkeypatch.setattr("kvcellar.adapters.of_request", broken)
    worker = manager()
    assert load(worker, folder)
    assert loads.take_report(0, 1).ranks[0].loaded == {NUMBER: None}


def test_an_adapter_that_cannot_be_loaded_changes_nothing(folder: Path, tmp_path: Path, loads: Any) -> None:
    """vLLM loads first and puts the new adapter in its place later: the old one goes on."""
    worker = manager()
    load(worker, folder)
    adapters = scheduler(loads.take_report(0, 1))
    before = adapters.identity(request(folder))
    with pytest.raises(Exception, match="nowhere"):
        worker._load_adapter(request(tmp_path / "nowhere"))
    assert loads.take_report(0, 2) is None
    assert adapters.identity(request(folder)) == before


def test_two_engines_in_one_process_do_not_vouch_for_each_other(folder: Path, loads: Any) -> None:
    first, second = manager(), manager()
    load(first, folder)
    load(second, folder)
    assert loads.take_report(0, 1).ranks[0].loaded == {}
