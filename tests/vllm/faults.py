"""Faults in a running engine: hooks and native calls that raise as told, and connectors made anew between two of them.

Everything here runs in the engine's own process (see `engine_process`), where both sides can be reached.
"""

import ast
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.vllm.answers import Answer
from tests.vllm.engines import Engine

ROUNDS = 2
IDLE_STEPS = 3
ABORTED = "aborted"


class InjectedError(RuntimeError):
    """A fault that a test has put in."""


@dataclass
class Schedule:
    """When a call fails: from the `first`-th one on, `count` times; before its work or `late`, after it."""

    first: int
    count: int
    late: bool = False
    calls: int = 0
    raised: int = 0

    def run(self, work: Callable[..., Any], arguments: Sequence[Any], named: dict[str, Any]) -> Any:
        """One call."""
        self.calls += 1
        due = self.first <= self.calls < self.first + self.count
        result = work(*arguments, **named) if self.late or not due else None
        if due:
            self.raised += 1
            raise InjectedError(f"call {self.calls}")
        return result


MODES = {
    "first": lambda: Schedule(1, 1),
    "second, after its work": lambda: Schedule(2, 1, late=True),
    "always": lambda: Schedule(1, 1 << 30),
}


@dataclass(frozen=True)
class Fault:
    """Where a fault is put in.

    Attributes:
        target: "scheduler" or "worker" for a hook, "TierEngine" or "CopyWorker" for a native call.
        name: the hook or call.
        mode: a key of `MODES`.

    """

    target: str
    name: str
    mode: str


class FaultyHook:
    """One side of the connector; what one hook asks of it fails as told."""

    def __init__(self, side: Any, hook: str, schedule: Schedule) -> None:
        vars(self).update(side=side, hook=hook, schedule=schedule)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.side, name)
        if sys._getframe(1).f_code.co_name != self.hook or not callable(value):
            return value
        return lambda *arguments, **named: self.schedule.run(value, arguments, named)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.side, name, value)


class FaultyCall:
    """A native object one of whose calls fails as told."""

    def __init__(self, native: Any, call: str, schedule: Schedule) -> None:
        self._native, self._call, self._schedule = native, call, schedule

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._native, name)
        if name != self._call:
            return value
        return lambda *arguments, **named: self._schedule.run(value, arguments, named)


def native_calls(class_name: str) -> set[str]:
    """Methods of a native class, from the package's own stubs."""
    import kvcellar

    stubs = ast.parse((Path(kvcellar.__file__).parent / "_native.pyi").read_text())
    found = next(node for node in stubs.body if isinstance(node, ast.ClassDef) and node.name == class_name)
    methods = [node for node in found.body if isinstance(node, ast.FunctionDef)]
    return {node.name for node in methods if not node.name.startswith("__") and not node.decorator_list}


def _core(engine: Engine) -> Any:
    return engine.llm.llm_engine.engine_core.engine_core


def _renew(engine: Engine) -> tuple[Any, Any]:
    """New connectors for the running engine, as at a start: (scheduler's, worker's), not yet shaken hands."""
    from vllm.distributed.kv_transfer import kv_transfer_state
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

    scheduler = _core(engine).scheduler
    worker = kv_transfer_state._KV_CONNECTOR_AGENT
    assert worker is not None
    tensors = dict(vars(engine).setdefault("kv_caches", dict(worker._worker._kv_caches)))
    worker.shutdown()
    scheduler.connector.shutdown()
    make = KVConnectorFactory.create_connector
    config, caches = scheduler.vllm_config, scheduler.kv_cache_config
    new_worker = make(config, KVConnectorRole.WORKER, caches)
    new_scheduler = make(config, KVConnectorRole.SCHEDULER, caches)
    kv_transfer_state._KV_CONNECTOR_AGENT = new_worker
    scheduler.connector = new_scheduler
    return new_scheduler, (new_worker, tensors)


def _shake_hands(engine: Engine, scheduler: Any, worker: Any, tensors: dict[str, Any]) -> None:
    worker.register_kv_caches(tensors)
    metadata = worker.get_handshake_metadata()
    if metadata is not None:
        scheduler.set_xfer_handshake_metadata_pp_aware({(0, 0): metadata})
    scheduler.bind_kv_cache_manager(_core(engine).scheduler.kv_cache_manager)


@dataclass(frozen=True)
class Outcome:
    """What a run with a fault came to."""

    raised: int
    raised_then: int
    answers: tuple[Answer, ...]
    again: tuple[Answer, ...]
    free_blocks_missing: int
    unfinished: int
    leftovers: dict[str, float]
    errors: float
    in_service: float
    loaded_out_of_service: int


def run(
    engine: Engine, fault: Fault, prompts: Sequence[Sequence[int]], max_tokens: int, then: Fault | None = None
) -> Outcome:
    """Traffic with a fault in it, from new connectors on.

    Args:
        engine: the engine.
        fault: the fault.
        prompts: asked for all at once, in several rounds, each after vLLM's own cache was emptied.
        max_tokens: tokens of each answer.
        then: a fault in a native call that is made because of the first one.

    """
    schedule = MODES[fault.mode]()
    errors_before = engine.metrics().cellar("internal_errors_total")
    scheduler, (worker, tensors) = _renew(engine)
    _put_in(scheduler, worker, fault, schedule)
    second = MODES[then.mode]() if then is not None else None
    if then is not None and second is not None:
        _put_in(scheduler, worker, then, second)
    _shake_hands(engine, scheduler, worker, tensors)
    for one, its in ((fault, schedule), (then, second)):
        # The native worker is made while hands are shaken.
        if one is not None and its is not None and one.target == "CopyWorker":
            worker._worker._native = FaultyCall(worker._worker._native, one.name, its)
    answers: tuple[Answer, ...] = ()
    for _ in range(ROUNDS):
        engine.reset_gpu_cache()
        answers = together(engine, prompts, max_tokens)
    for _ in range(2):
        engine.llm.reset_prefix_cache(reset_connector=True)
    for _ in range(ROUNDS):
        answers = together(engine, prompts, max_tokens)
        _idle(engine)
        engine.reset_gpu_cache()
    retired_from = engine.metrics().hit_tokens
    again = together(engine, prompts, max_tokens)
    for _ in range(3):
        engine.complete((1, 2, 3), max_tokens=1)
    metrics = engine.metrics()
    core = _core(engine)
    pool = core.scheduler.kv_cache_manager.block_pool
    out = metrics.cellar("in_service") == 0
    outcome = Outcome(
        raised=schedule.raised,
        raised_then=second.raised if second is not None else 0,
        answers=answers,
        again=again,
        free_blocks_missing=pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
        unfinished=core.scheduler.get_num_unfinished_requests(),
        leftovers=metrics.leftovers(),
        errors=metrics.cellar("internal_errors_total") - errors_before,
        in_service=metrics.cellar("in_service"),
        loaded_out_of_service=metrics.hit_tokens - retired_from if out else 0,
    )
    _end(scheduler, worker)
    return outcome


def _put_in(scheduler: Any, worker: Any, fault: Fault, schedule: Schedule) -> None:
    if fault.target == "scheduler":
        scheduler._scheduler = FaultyHook(scheduler._scheduler, fault.name, schedule)
    elif fault.target == "worker":
        worker._worker = FaultyHook(worker._worker, fault.name, schedule)
    elif fault.target == "TierEngine":
        scheduler._scheduler._engine = FaultyCall(scheduler._scheduler._engine, fault.name, schedule)


def _idle(engine: Engine) -> None:
    """What EngineCore's loop does when no request runs: it asks whether to step all the same."""
    core = _core(engine)
    for _ in range(IDLE_STEPS):
        pending = core.scheduler.connector.has_pending_push_work()
        if pending or core.scheduler.has_requests():
            engine.llm.llm_engine.step()


def _end(scheduler: Any, worker: Any) -> None:
    """Shut both sides, past the faults: shutting down is itself a hook that may have been made to fail."""
    if isinstance(worker._worker, FaultyHook):
        worker._worker = worker._worker.side
    while isinstance(worker._worker._native, FaultyCall):
        worker._worker._native = worker._worker._native._native
    if isinstance(scheduler._scheduler, FaultyHook):
        scheduler._scheduler = scheduler._scheduler.side
    while isinstance(scheduler._scheduler._engine, FaultyCall):
        scheduler._scheduler._engine = scheduler._scheduler._engine._native


def together(engine: Engine, prompts: Sequence[Sequence[int]], max_tokens: int) -> tuple[Answer, ...]:
    """All prompts at once, beside one more of each that is aborted after some steps."""
    front = engine.llm.llm_engine
    found: dict[str, Answer] = {}
    for index, tokens in enumerate(prompts):
        for kind in ("whole", ABORTED):
            front.add_request(f"{kind}-{index}", {"prompt_token_ids": list(tokens)}, engine._sampling(max_tokens, None))
    steps = 0
    while front.has_unfinished_requests():
        for output in front.step():
            if output.finished and output.request_id.startswith("whole"):
                found[output.request_id] = Answer.of_output(output)
        steps += 1
        if steps <= len(prompts):
            front.abort_request([f"{ABORTED}-{steps - 1}"])
    return tuple(found[f"whole-{index}"] for index in range(len(prompts)))
