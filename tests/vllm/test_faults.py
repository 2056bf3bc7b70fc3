"""No fault of ours reaches vLLM: every hook of both sides and every native call fails once, later, and always.

vLLM keeps serving with the answers that it gives without us, nothing is held at the end, and nothing is served from the
tiers after they went out of service.
"""

import random
from collections.abc import Iterator
from inspect import isfunction

import pytest

from tests.vllm import faults, tiny_models
from tests.vllm.answers import Answer
from tests.vllm.engine_process import EngineProcess, start_engine
from tests.vllm.engines import Engine
from tests.vllm.faults import Fault
from tests.vllm.places import temporary_pool_dir
from tests.vllm.prompts import prompt

MAX_TOKENS = 20
LENGTHS = (70, 130, 200)
# The same tokens, computed in passes of other shapes: the last bits differ.
LOGPROB_DIFFERENCE_MAX = 1e-3

# Each hook's side. What is not reached by ordinary traffic says why.
HOOKS = {
    "set_xfer_handshake_metadata_pp_aware": "scheduler",
    "bind_kv_cache_manager": "scheduler",
    "on_new_request": "scheduler",
    "get_num_new_matched_tokens": "scheduler",
    "update_state_after_alloc": "scheduler",
    "get_external_cache_hit_sources": "scheduler",
    "build_connector_meta": "scheduler",
    "update_connector_output": "scheduler",
    "request_finished_all_groups": "scheduler",
    "has_pending_push_work": "scheduler",
    "take_events": "scheduler",
    "reset_cache": "scheduler",
    "get_kv_connector_stats": "scheduler",
    "shutdown": "scheduler",
    "register_kv_caches": "worker",
    "get_handshake_metadata": "worker",
    "handle_preemptions": "worker",
    "bind_connector_metadata": "worker",
    "wait_for_save": "worker",
    "get_transfer_results": "worker",
    "build_connector_worker_meta": "worker",
}
# Native calls that ordinary traffic does not make, with the reason.
NOT_CALLED = {
    "TierEngine": {
        "take_events": "events come with take_report, unless a disk loses blocks or the tiers retire",
        "forgotten": "asked at the end of a request that forgets: what raises there, its hook catches like any other",
        "held": "for tests",
        "gauges": "for tests",
        "withdraw": "made after a fault only: see the test of the second fault",
    },
    "CopyWorker": {
        "take_notes": "there is no GPU",
        "in_flight": "made after a fault only: see the test of the second fault",
        "release": "made after a fault only: see the test of the second fault",
    },
}
ONCE = {
    "set_xfer_handshake_metadata_pp_aware",
    "bind_kv_cache_manager",
    "register_kv_caches",
    "get_handshake_metadata",
    "open_pool",
    "ticket",
    "attached",
    "attach",
    "release_with",
}
AT_THE_END = {"shutdown", "close"}


@pytest.fixture(scope="module")
def engine(vllm_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """One process, a tiny Llama, events on."""
    work_dir = tmp_path_factory.mktemp("faults")
    with temporary_pool_dir() as pool_dir:
        options = {
            "model": tiny_models.llama(work_dir / "model"),
            "cellar": {"dram_size": "32MiB", "namespace_salt": "faults", "keep_pool": False},
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "kv_cache_memory_bytes": 16 << 20,
            "kv_events_config": {"enable_kv_cache_events": True, "publisher": "null"},
        }
        with start_engine(work_dir, pool_dir, **options) as engine:
            engine.wait_ready()
            yield engine


@pytest.fixture(scope="module")
def prompts(seed: int) -> list[list[int]]:
    rng = random.Random(f"faults-{seed}")
    return [prompt(rng, length, 0, tiny_models.VOCABULARY - 1) for length in LENGTHS]


@pytest.fixture(scope="module")
def alone(engine: EngineProcess, prompts: list[list[int]]) -> list[Answer]:
    """What vLLM answers without our tiers."""
    answers = []
    for tokens in prompts:
        engine.call(Engine.reset_gpu_cache)
        answers.append(engine.call(Engine.complete, tokens, MAX_TOKENS, {"load": False, "store": False}))
    return answers


def cases() -> list[Fault]:
    places = [(side, hook) for hook, side in HOOKS.items() if hook not in AT_THE_END]
    for name in ("TierEngine", "CopyWorker"):
        calls = faults.native_calls(name) - set(NOT_CALLED[name]) - AT_THE_END
        places += [(name, call) for call in sorted(calls)]
    # What is called once cannot fail a second time.
    return [
        Fault(target, name, mode)
        for target, name in places
        for mode in faults.MODES
        if name not in ONCE or not mode.startswith("second")
    ]


def assert_close(reference: Answer, answer: Answer, what: str) -> None:
    assert answer.tokens == reference.tokens, f"{what}: {answer.tokens} instead of {reference.tokens}"
    for expected, got in zip(reference.logprobs, answer.logprobs, strict=True):
        known = {token: value for token, value, _ in expected}
        both = [abs(value - known[token]) for token, value, _ in got if token in known]
        assert len(both) >= len(got) - 1, f"{what}: other tokens are likely"
        assert max(both) < LOGPROB_DIFFERENCE_MAX, f"{what}: {both}"


def test_every_hook_has_a_row() -> None:
    from kvcellar import connector, hooks

    assert connector
    assert set(HOOKS) == hooks.HOOKS


def test_every_hook_that_is_overridden_is_guarded() -> None:
    from kvcellar import hooks
    from kvcellar.connector import KVCellarConnector

    # Without work of its own, or called as a class.
    plain = {"start_load_kv", "wait_for_layer_load", "save_kv_layer", "request_finished", "requires_kv_delivery"}
    own = {name for name, value in vars(KVCellarConnector).items() if isfunction(value) and not name.startswith("_")}
    assert own - plain == hooks.HOOKS


def test_without_a_fault_everything_is_served_from_the_tiers(
    engine: EngineProcess, prompts: list[list[int]], alone: list[Answer]
) -> None:
    """The traffic does what the other tests count on."""
    before = engine.call(Engine.metrics).hit_tokens
    fault = Fault("scheduler", "no hook of this name", "first")
    outcome = engine.call(faults.run, fault, prompts, MAX_TOKENS)
    assert engine.call(Engine.metrics).hit_tokens > before
    assert (outcome.errors, outcome.in_service) == (0, 1)
    check(outcome, alone, "no fault")


def check(outcome: faults.Outcome, alone: list[Answer], what: str) -> None:
    for reference, answer, again in zip(alone, outcome.answers, outcome.again, strict=True):
        assert_close(reference, answer, what)
        assert_close(reference, again, f"{what}, afterwards")
    assert outcome.free_blocks_missing == outcome.unfinished == 0, what
    assert not outcome.leftovers, what
    assert outcome.loaded_out_of_service == 0, what


@pytest.mark.parametrize("fault", cases(), ids=lambda fault: f"{fault.target}.{fault.name}-{fault.mode}")
def test_a_fault_costs_the_tiers_and_nothing_else(
    engine: EngineProcess, prompts: list[list[int]], alone: list[Answer], fault: Fault
) -> None:
    outcome = engine.call(faults.run, fault, prompts, MAX_TOKENS)
    assert outcome.raised > 0, "the fault was never reached"
    check(outcome, alone, str(fault))
    assert outcome.errors > 0
    assert outcome.in_service == 0


@pytest.mark.parametrize(
    ("fault", "then"),
    [
        (Fault("TierEngine", "lookup", "first"), Fault("TierEngine", "withdraw", "always")),
        (Fault("TierEngine", "step", "second, after its work"), Fault("TierEngine", "close", "always")),
        (Fault("CopyWorker", "begin_step", "second, after its work"), Fault("CopyWorker", "release", "always")),
        (Fault("CopyWorker", "start_loads", "second, after its work"), Fault("CopyWorker", "release", "always")),
    ],
    ids=["withdraw", "close", "release", "release with loads"],
)
def test_a_second_fault_on_the_way_out_changes_nothing(
    engine: EngineProcess, prompts: list[list[int]], alone: list[Answer], fault: Fault, then: Fault
) -> None:
    outcome = engine.call(faults.run, fault, prompts, MAX_TOKENS, then)
    assert outcome.raised > 0
    assert outcome.raised_then > 0
    check(outcome, alone, f"{fault}, {then}")
    assert outcome.in_service == 0
