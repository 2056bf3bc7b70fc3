"""vLLM's offline engine: `vllm.LLM` in the test process, EngineCore and workers in processes of their own."""

import contextlib
import gc
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.deadlines import PACE, deadline
from tests.vllm import oplog, speed
from tests.vllm.answers import Answer
from tests.vllm.metrics import Snapshot
from tests.vllm.places import real_model, temporary_pool_dir
from tests.vllm.prompts import Conversation
from tests.vllm.server import BLOCK_TOKENS, CHUNK_TOKENS, MAX_MODEL_LEN, SETTLE_S, START_GOOD_S, transfer_config
from tests.vllm.sizes import DATA_TYPE, MIB, kv_bytes
from tests.vllm.subscriber import Subscriber

# A request shorter than a block: it makes the engine step and touches no key.
NUDGE = (1, 2, 3)
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation, with what came before it."""

    prompt: tuple[int, ...]
    answer: Answer


@dataclass(frozen=True)
class Served:
    """A request that ran alone: what an independent model may know of it."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass
class Engine:
    """A running engine."""

    llm: Any
    trace_file: Path
    pool_dir: Path
    detokenize: bool
    one_process: bool = False
    served: list[Served] = field(default_factory=list)
    # Outputs of EngineCore that `converse` received: one a step.
    steps: int = 0

    def _sampling(self, max_tokens: int, controls: Mapping[str, object] | None) -> Any:
        from vllm import SamplingParams

        extra = {"kv_transfer_params": {"kvcellar": dict(controls)}} if controls is not None else None
        return SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            logprobs=5,
            ignore_eos=True,
            detokenize=self.detokenize,
            extra_args=extra,
        )

    def complete(
        self, tokens: Sequence[int], max_tokens: int = 8, controls: Mapping[str, object] | None = None
    ) -> Answer:
        """One request, alone, to its end."""
        sampling = self._sampling(max_tokens, controls)
        outputs = self.llm.generate([{"prompt_token_ids": list(tokens)}], sampling, use_tqdm=False)
        answer = Answer.of_output(outputs[0])
        self.served.append(Served(tuple(tokens), answer.tokens))
        return answer

    def transfer(
        self, tokens: Sequence[int], max_tokens: int, params: Mapping[str, object]
    ) -> tuple[Answer, dict[str, Any] | None]:
        """`complete` with whole `kv_transfer_params`, and those that come back: one half of a disaggregated request."""
        sampling = self._sampling(max_tokens, None)
        sampling.extra_args = {"kv_transfer_params": dict(params)}
        outputs = self.llm.generate([{"prompt_token_ids": list(tokens)}], sampling, use_tqdm=False)
        return Answer.of_output(outputs[0]), outputs[0].kv_transfer_params

    def converse(self, conversations: Sequence[Conversation], max_tokens: int) -> list[Turn]:
        """Runs all conversations at once, each at its own pace: its next turn starts when it has the last answer."""
        engine = self.llm.llm_engine
        turns: list[Turn] = []

        def ask(lane: int) -> None:
            tokens = conversations[lane].ask(max_tokens)
            if tokens is not None:
                prompt = {"prompt_token_ids": list(tokens)}
                engine.add_request(f"lane-{lane}-{len(tokens)}", prompt, self._sampling(max_tokens, None))

        for lane in range(len(conversations)):
            ask(lane)
        while engine.has_unfinished_requests():
            self.steps += 1
            for output in engine.step():
                if output.finished:
                    lane = int(output.request_id.split("-")[1])
                    turns.append(Turn(tuple(output.prompt_token_ids), Answer.of_output(output)))
                    conversations[lane].hear(turns[-1].answer.tokens)
                    ask(lane)
        return turns

    def metrics(self) -> Snapshot:
        """The present reading of the engine's metrics."""
        return Snapshot.of_engine(self.llm.get_metrics())

    def reset_gpu_cache(self) -> None:
        """Empties vLLM's own prefix cache; ours stays."""
        assert self.llm.reset_prefix_cache(), "vLLM could not reset its prefix cache"

    def reset_all(self) -> None:
        """Empties vLLM's prefix cache and ours."""
        assert self.llm.reset_prefix_cache(reset_connector=True), "vLLM could not reset both caches"

    def trace(self) -> list[oplog.Op]:
        """The engine's operation log so far."""
        return oplog.read(self.trace_file)

    def wait_in_service(self) -> None:
        """Lets the tiers come into service: beside other connectors that takes a few steps, not a handshake."""
        end = time.monotonic() + deadline(SETTLE_S)
        while time.monotonic() < end:
            self.complete(NUDGE, max_tokens=1)
            if self.metrics().cellar("in_service") == 1:
                # The workers attach with the next steps.
                for _ in range(3):
                    self.complete(NUDGE, max_tokens=1)
                return
            time.sleep(0.05)
        raise AssertionError("the tiers did not come into service")

    def settle(self) -> Snapshot:
        """Lets all copies end and all numbers arrive."""
        end = time.monotonic() + deadline(SETTLE_S)
        while time.monotonic() < end:
            self.complete(NUDGE, max_tokens=1)
            if oplog.outstanding(self.trace()) == 0:
                self.complete(NUDGE, max_tokens=1)
                return self.metrics()
            time.sleep(0.01)
        raise AssertionError(f"copies did not end: {oplog.outstanding(self.trace())} loads and batches outstanding")

    def close(self) -> None:
        """Ends the engine's processes, or what it has left in this one."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        if self.one_process:
            from vllm.distributed import cleanup_dist_env_and_memory

            cleanup_dist_env_and_memory()
        gc.collect()


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for the processes that an engine starts meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def open_engine(
    work_dir: Path,
    pool_dir: Path,
    *,
    cellar: Mapping[str, object] | None,
    model: Path | None = None,
    transfer: Mapping[str, object] | None = None,
    env: Mapping[str, str] | None = None,
    name: str = "engine",
    one_process: bool = False,
    **options: Any,
) -> Iterator[Engine]:
    """Starts an engine and ends it afterwards.

    Args:
        work_dir: where the operation log goes.
        pool_dir: where the pool goes.
        cellar: our configuration, in which None takes a key away; nothing at all: an engine without a connector.
        model: the real model unless given.
        transfer: further keys of `kv_transfer_config`, which win over ours.
        env: environment of the engine's processes.
        name: tells engines of one `work_dir` apart.
        one_process: EngineCore and worker in this process, which starts several times sooner. Such an engine steps
            only while it is asked something; one at a time; and what it computes may differ in the last bits from
            what an engine in processes of its own does, whose threads are counted otherwise.
        options: arguments of `vllm.LLM` beside those set here.

    """
    from vllm import LLM

    trace_file = work_dir / f"{name}.trace.jsonl"
    arguments: dict[str, Any] = {
        "model": str(model or real_model()),
        "seed": 0,
        "enforce_eager": True,
        "block_size": BLOCK_TOKENS,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": 8,
        "max_num_batched_tokens": CHUNK_TOKENS,
        "dtype": DATA_TYPE.name,
        "kv_cache_memory_bytes": kv_bytes(1024 * MIB),
        "enable_prefix_caching": True,
        "enable_chunked_prefill": True,
        "disable_log_stats": False,
        "disable_hybrid_kv_cache_manager": False,
    }
    if cellar is not None:
        settings = {"pool_dir": str(pool_dir), "trace_file": str(trace_file), **cellar}
        ours = transfer_config({key: value for key, value in settings.items() if value is not None})
        arguments["kv_transfer_config"] = {**ours, **(transfer or {})}
    if one_process:
        arguments["distributed_executor_backend"] = "uni"
    arguments.update(options)
    speed.learn()
    with environment({**(ONE_PROCESS if one_process else {}), **(env or {})}):
        begun, detokenize = time.monotonic(), not arguments.get("skip_tokenizer_init", False)
        engine = Engine(LLM(**arguments), trace_file, pool_dir, detokenize, one_process)
        PACE.see(time.monotonic() - begun, START_GOOD_S)
        try:
            yield engine
        finally:
            engine.close()


@contextlib.contextmanager
def open_heard(work_dir: Path, *, cellar: Mapping[str, object], **options: Any) -> Iterator[tuple[Engine, Subscriber]]:
    """`open_engine` with a pool directory of its own and a real subscriber to its KVEvents."""
    from vllm.config.kv_events import KVEventsConfig

    with temporary_pool_dir() as pool_dir, Subscriber(f"ipc://{pool_dir}/events.sock") as subscriber:
        # vLLM would bind a TCP endpoint on all interfaces.
        events = KVEventsConfig(enable_kv_cache_events=True, publisher="zmq", endpoint=subscriber.endpoint)
        with open_engine(work_dir, pool_dir, cellar=cellar, kv_events_config=events, **options) as engine:
            yield engine, subscriber
