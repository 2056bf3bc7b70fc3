"""kvcellar's connector against the vLLM versions it supports, from source text alone (see `contract`).

| vLLM | how it is covered                                                                  |
| ---- | ---------------------------------------------------------------------------------- |
| 0.31 | this contract: names, signatures, calls and their order, fields; and scripts/matrix  |
| 0.32 | this contract, and end to end: tests/vllm runs the CPU build of this version         |
| 0.33 | this contract; and scripts/matrix, its Python sources over the CPU build of 0.32     |

What a contract cannot see is behaviour behind equal signatures; only a version run end to end is tested for that.
"""

from importlib.util import find_spec
from pathlib import Path

import pytest
from contract import facts as facts_module
from contract import rules
from contract.facts import Facts
from contract.ours import Ours
from contract.shapes import Call, Method
from contract.sources import Sources

FOLDER = Path(__file__).parent / "contract"
PACKAGE = Path(__file__).parents[2] / "python" / "kvcellar"
SUPPORTED = ("0.31.0", "0.32.0", "0.33.0")
CONNECTOR = "KVCellarConnector"
CONNECTOR_BASES = ("KVConnectorBase_V1", "SupportsHMA")
SUBCLASSED = (
    "KVConnectorMetadata",
    "KVConnectorHandshakeMetadata",
    "KVConnectorWorkerMetadata",
    "KVConnectorStats",
    "KVConnectorPromMetrics",
)
CONSTRUCTED = (
    "BlockStored",
    "BlockRemoved",
    "AllBlocksCleared",
    "KVConnectorOutput",
    "KVConnectorTransferResults",
)
READ = (
    "Request",
    "SchedulerOutput",
    "NewRequestData",
    "CachedRequestData",
    "KVConnectorOutput",
    "KVConnectorBlockState",
    "KVCacheTensor",
    "KVCacheGroupSpec",
)
# The worker hands results over while the step's metadata is still bound, and saves before it
# reports.
STEP_ORDER = (
    "get_transfer_results",
    "get_block_ids_with_load_errors",
    "get_kv_connector_stats",
    "get_kv_connector_kv_cache_events",
    "build_connector_worker_meta",
    "clear_connector_metadata",
)

EXAMPLE = """
class KVCellarConnector(KVConnectorBase_V1, SupportsHMA):
    def __init__(self, vllm_config, role, kv_cache_config): ...
    def start_load_kv(self, forward_context, **kwargs): ...
    def wait_for_layer_load(self, layer_name): ...
    def save_kv_layer(self, layer_name, kv_layer, attn_metadata, **kwargs): ...
    def wait_for_save(self): ...
    def get_num_new_matched_tokens(self, request: "Request", num_computed_tokens): return request.num_tokens, True
    def update_state_after_alloc(self, request, blocks, num_external_tokens): ...
    def build_connector_meta(self, scheduler_output): ...
    def request_finished_all_groups(self, request, block_ids): ...
    def get_external_cache_hit_sources(self, request, num_external_tokens): ...
    @property
    def requires_kv_delivery(self): return False
    def _event(self): return BlockRemoved(block_hashes=[], medium="CPU", group_idx=0)
"""


def read(version: str) -> Facts:
    return facts_module.read(FOLDER / f"vllm-{version}.json")


def complaints(ours: Ours, facts: Facts) -> list[str]:
    """Everything that is wrong with our sources under one vLLM version."""
    methods = ours.methods_of(CONNECTOR)
    base = rules.theirs(facts, CONNECTOR_BASES)
    found = rules.missing(methods, base) + rules.incompatible(methods, base)
    found += rules.refused(methods, base, rules.calls_of(facts))
    for parent in SUBCLASSED:
        parent_methods = rules.theirs(facts, [parent])
        for name in ours.subclasses_of(parent):
            own = ours.methods_of(name)
            found += [f"{name}.{text}" for text in rules.missing(own, parent_methods)]
            found += [f"{name}.{text}" for text in rules.incompatible(own, parent_methods)]
    found += rules.misbuilt(ours, facts, CONSTRUCTED)
    return found + [text for type_name in READ for text in rules.unreadable(ours, facts, type_name)]


@pytest.fixture(scope="module")
def ours() -> Ours:
    return Ours.in_folder(PACKAGE)


@pytest.mark.parametrize("version", SUPPORTED)
def test_connector_fits_version(ours: Ours, version: str) -> None:
    assert complaints(ours, read(version)) == []


def test_connector_names_its_bases(ours: Ours) -> None:
    assert ours.bases_of(CONNECTOR) >= set(CONNECTOR_BASES)


def test_every_public_method_overrides_something(ours: Ours) -> None:
    versions = [rules.theirs(read(version), CONNECTOR_BASES) for version in SUPPORTED]
    assert rules.unknown(ours.methods_of(CONNECTOR), versions) == []


@pytest.mark.parametrize("version", SUPPORTED)
def test_registration_is_accepted(ours: Ours, version: str) -> None:
    register = Method.parse(read(version)["methods"]["KVConnectorFactory"]["register_connector"])
    calls = ours.calls_of("register_connector")
    assert calls, "the plugin registers no connector"
    assert [call.render() for call in calls if not rules.accepts(register, call)] == []


@pytest.mark.parametrize("version", SUPPORTED)
def test_runner_v1_step_order(version: str) -> None:
    function = "KVConnectorModelRunnerMixin._get_kv_connector_output"
    expected = ("bind_connector_metadata", "start_load_kv", "wait_for_save", *STEP_ORDER)
    assert rules.out_of_order(read(version), rules.RUNNER_V1, function, expected) == []


@pytest.mark.parametrize("version", SUPPORTED)
def test_runner_v2_step_order(version: str) -> None:
    facts = read(version)
    before = ("handle_preemptions", "bind_connector_metadata")
    assert rules.out_of_order(facts, rules.RUNNER_V2, "ActiveKVConnector.pre_forward", before) == []
    after = ("wait_for_save", *STEP_ORDER)
    assert rules.out_of_order(facts, rules.RUNNER_V2, "ActiveKVConnector.post_forward", after) == []


def test_installed_vllm_is_the_recorded_one() -> None:
    found = find_spec("vllm")
    if found is None or found.origin is None:
        pytest.skip("vLLM is not installed: the recorded facts are all there is")
    live = facts_module.collect(Sources(Path(found.origin).parent))
    if live["vllm"] not in SUPPORTED:
        pytest.skip(f"vLLM {live['vllm']} is not among {SUPPORTED}; record it with scripts/contract_facts")
    assert live == read(live["vllm"])


@pytest.mark.parametrize("version", SUPPORTED)
def test_example_fits(version: str) -> None:
    assert complaints(Ours.of_text(EXAMPLE), read(version)) == []


@pytest.mark.parametrize(
    ("good", "bad", "expected"),
    [
        ("def wait_for_save(self): ...", "pass", "wait_for_save: abstract"),
        ("def request_finished_all_groups(self, request, block_ids): ...", "pass", "request_finished_all_groups: abs"),
        ("(self, layer_name): ...", "(self): ...", "wait_for_layer_load"),
        ("forward_context, **kwargs", "forward_context", "start_load_kv"),
        ("request, blocks, num_external_tokens", "request, blocks, external", "update_state_after_alloc"),
        ("self, scheduler_output): ...", "self, scheduler_output, step): ...", "build_connector_meta"),
        ("    @property\n", "", "requires_kv_delivery: a method here, a property"),
        ("role, kv_cache_config): ...", "role): ...", "__call__"),
        ("request.num_tokens", "request.token_count", "Request.token_count does not exist"),
        ("group_idx=0", "lookahead=0", "BlockRemoved"),
        ('medium="CPU", ', "", "BlockRemoved"),
    ],
)
def test_broken_connector_is_refused(good: str, bad: str, expected: str) -> None:
    broken = EXAMPLE.replace(good, bad, 1)
    assert broken != EXAMPLE
    assert any(expected in text for text in complaints(Ours.of_text(broken), read("0.32.0")))


def test_misspelled_override_is_refused() -> None:
    methods = Ours.of_text(EXAMPLE.replace("get_external_cache_hit_sources", "get_external_cache_hit_source"))
    versions = [rules.theirs(read(version), CONNECTOR_BASES) for version in SUPPORTED]
    assert rules.unknown(methods.methods_of(CONNECTOR), versions) != []


def test_swapped_step_order_is_refused() -> None:
    function = "KVConnectorModelRunnerMixin._get_kv_connector_output"
    swapped = ("wait_for_save", "bind_connector_metadata")
    assert rules.out_of_order(read("0.32.0"), rules.RUNNER_V1, function, swapped) != []


@pytest.mark.parametrize("text", ["take_events()", "observe(_, _, engine_idx=_)", "start(*_, **_)", "role"])
def test_calls_read_back(text: str) -> None:
    assert Call.parse(text).render() == text


@pytest.mark.parametrize("text", ["abstract method (self, a, b=..., *, c, d=..., **kwargs)", "property (self)"])
def test_methods_read_back(text: str) -> None:
    assert Method.parse(text).render() == text
