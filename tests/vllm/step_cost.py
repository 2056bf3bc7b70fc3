"""What our hooks cost beside vLLM's own scheduling, with many requests and long prompts that nobody repeats.

vLLM's real scheduler, block pool and connector factory run in this process; no model does. Measured: CPU time of this
thread inside our hooks, and in `schedule`, `update_from_output`, `add_request` and `finish_requests` around them, for
steps that compute prompts (other requests decode beside them), for steps in which all requests decode, and for each
request, from its arrival to its end. Copies are real: a worker's threads make them meanwhile, of very small blocks.
Not measured: what EngineCore does beside scheduling, and the model, in which our share of a real step is smaller.

    python -m tests.vllm.step_cost --json
"""

import argparse
import collections
import contextlib
import gc
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.vllm.overhead import Result, commit, machine
from tests.vllm.places import temporary_pool_dir
from tests.vllm.sums import clock_cost_ns
from tests.vllm.timed import CALLS

RUNNING = (1, 8, 64, 256)
PROMPT_TOKENS = 16_384
CHUNK_TOKENS = 8_192
BLOCK_TOKENS = 16
LAYER = "model.layers.0.self_attn.attn"
HEAD_DIM = 8
PAGE_BYTES = 2 * BLOCK_TOKENS * HEAD_DIM * 2
VOCABULARY = 32_000


@dataclass
class Stopwatch:
    """CPU time of this thread inside our hooks."""

    spent_ns: int = 0
    calls: int = 0

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, timed."""

        def timed(*arguments: Any, **named: Any) -> Any:
            begin = time.thread_time_ns()
            try:
                return call(*arguments, **named)
            finally:
                self.spent_ns += time.thread_time_ns() - begin
                self.calls += 1

        return timed


@dataclass
class Phase:
    """Sums over a phase of a round."""

    steps: int = 0
    ours_ns: float = 0.0
    vllm_ns: float = 0.0

    @property
    def step_us(self) -> float:
        """Time of our hooks in one step."""
        return self.ours_ns / self.steps / 1e3

    @property
    def share(self) -> float:
        """Time of our hooks over that of vLLM's own scheduling."""
        return self.ours_ns / self.vllm_ns


@dataclass
class Rounds:
    """Measurements with one number of requests, one element a round."""

    prefill: list[Phase] = field(default_factory=list)
    decode: list[Phase] = field(default_factory=list)
    whole: list[Phase] = field(default_factory=list)


class Bench:
    """vLLM's scheduler with our connector, and a worker that copies what the steps order."""

    def __init__(self, scheduler: Any, worker: Any, depth: int) -> None:
        self.scheduler = scheduler
        self._worker = worker
        self._depth = depth
        self._in_flight: collections.deque[Any] = collections.deque()
        self._watch = Stopwatch()
        self._clock_ns = clock_cost_ns()
        self._phase = Phase()
        for name in CALLS:
            if hasattr(scheduler.connector, name):
                setattr(scheduler.connector, name, self._watch.around(getattr(scheduler.connector, name)))

    def phase(self) -> Phase:
        """From here on another phase is measured."""
        self._phase = Phase()
        return self._phase

    def run(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """A call of vLLM's, with our hooks in it."""
        ours, calls, begin = self._watch.spent_ns, self._watch.calls, time.thread_time_ns()
        result = call(*arguments)
        whole = time.thread_time_ns() - begin
        ours, calls = self._watch.spent_ns - ours, self._watch.calls - calls
        self._phase.ours_ns += ours - calls * self._clock_ns
        # Reading the clock twice takes twice what it adds to what it times.
        self._phase.vllm_ns += whole - ours - (calls + 1) * self._clock_ns
        return result

    def step(self) -> None:
        """One step, as EngineCore goes: with asynchronous scheduling the next one is scheduled before one ends."""
        self.schedule()
        self.end_steps()

    def schedule(self) -> Any:
        """The first half of a step, with the worker's part of it."""
        output = self.run(self.scheduler.schedule)
        self._phase.steps += 1
        metadata = output.kv_connector_metadata
        if metadata.ticket is not None:
            self._worker.attach(metadata.ticket)
        if metadata.plan:
            self._worker.begin_step(metadata.plan)
        self._worker.start_loads()
        self._worker.finish_step()
        # A step that computes only a part of a prompt gives no token.
        requests = self.scheduler.requests
        sampled = [[] if requests[name].is_prefill_chunk else [7] for name in output.num_scheduled_tokens]
        self._in_flight.append((output, sampled))
        return output

    def end_steps(self) -> None:
        """The second half, of steps that were scheduled long enough ago."""
        while len(self._in_flight) >= self._depth:
            self._end_step()

    def _end_step(self) -> None:
        from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

        output, sampled = self._in_flight.popleft()
        ids = list(output.num_scheduled_tokens)
        index = {name: number for number, name in enumerate(ids)}
        told = KVConnectorOutput(finished_recving=set(), finished_sending=set())
        made = ModelRunnerOutput(ids, index, sampled, kv_connector_output=told)
        self.run(self.scheduler.update_from_output, output, made)

    def drain(self) -> None:
        """Ends steps under way."""
        while self._in_flight:
            self._end_step()


def _llama(path: Path) -> str:
    """A configuration without weights."""
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HEAD_DIM,
        intermediate_size=2 * HEAD_DIM,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=4 * PROMPT_TOKENS,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(path)
    return str(path)


@contextlib.contextmanager
def opened(
    prompt_tokens: int, most: int, *, events: bool, chunk_tokens: int = CHUNK_TOKENS, blocks: int | None = None
) -> Iterator[Bench]:
    """A scheduler for so many requests at once, with our tiers in service.

    Unless told, vLLM has blocks for two rounds: what a round leaves in vLLM's own cache is evicted by the next one.
    """
    import torch
    from kvcellar import facts, views
    from kvcellar._native import Config, CopyWorker
    from kvcellar.metadata import RankOffer
    from vllm.config.kv_events import KVEventsConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import init_none_hash
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, KVCacheTensor
    from vllm.v1.structured_output import StructuredOutputManager

    blocks = blocks or 2 * most * (prompt_tokens // BLOCK_TOKENS + 64)
    with tempfile.TemporaryDirectory() as work_dir, temporary_pool_dir() as pool_dir:
        # A pool that is full all the time: each block that is stored evicts another.
        cellar = {"pool_dir": str(pool_dir), "dram_size": "256MiB", "namespace_salt": "step-cost"}
        vllm_config = EngineArgs(
            model=_llama(Path(work_dir)),
            skip_tokenizer_init=True,
            load_format="dummy",
            block_size=BLOCK_TOKENS,
            max_num_seqs=most,
            max_model_len=2 * prompt_tokens + 1024,
            max_num_batched_tokens=chunk_tokens,
            enable_prefix_caching=True,
            enable_chunked_prefill=True,
            kv_events_config=KVEventsConfig(enable_kv_cache_events=True, publisher="null") if events else None,
            kv_transfer_config={
                "kv_connector": "KVCellarConnector",
                "kv_role": "kv_both",
                "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": cellar,
            },
        ).create_engine_config()
        spec = FullAttentionSpec(block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=HEAD_DIM, dtype=torch.bfloat16)
        tensors = [KVCacheTensor(blocks * PAGE_BYTES, [LAYER], blocks * PAGE_BYTES, PAGE_BYTES)]
        kv_cache_config = KVCacheConfig(blocks, tensors, [KVCacheGroupSpec([LAYER], spec)])
        vllm_config.cache_config.num_gpu_blocks = blocks
        init_none_hash(get_hash_fn_by_name(vllm_config.cache_config.prefix_caching_hash_algo))
        scheduler = vllm_config.scheduler_config.get_scheduler_cls()(
            vllm_config,
            kv_cache_config,
            StructuredOutputManager(vllm_config),
            block_size=BLOCK_TOKENS,
            hash_block_size=BLOCK_TOKENS,
            log_stats=True,
        )
        assert scheduler.connector is not None
        assert scheduler.connector.role == KVConnectorRole.SCHEDULER
        memory = torch.zeros(blocks, PAGE_BYTES, dtype=torch.int8)
        worker = CopyWorker(
            Config.parse(json.dumps(cellar)), 0, views.native([[views.layer_view(LAYER, memory, blocks)]])
        )
        offer = RankOffer(facts.machine(), "BLHNC", "none", tuple(worker.block_bytes), shares=((0,),))
        scheduler.connector.set_xfer_handshake_metadata_pp_aware({(0, 0): offer})
        told = scheduler.connector.get_kv_connector_stats()
        assert told is not None
        assert told.data["gauges"]["in_service"] == 1, "the tiers are not in service"
        try:
            yield Bench(scheduler, worker, vllm_config.max_concurrent_batches)
        finally:
            worker.release(0.0)
            scheduler.connector.shutdown()


class Requests:
    """Makes requests that share no block."""

    def __init__(self, bench: Bench, prompt_tokens: int, seed: int) -> None:
        from vllm.utils.hashing import get_hash_fn_by_name
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher

        algorithm = bench.scheduler.cache_config.prefix_caching_hash_algo
        self._hasher = get_request_block_hasher(BLOCK_TOKENS, get_hash_fn_by_name(algorithm))
        self._prompt_tokens = prompt_tokens
        self._rng = random.Random(seed)
        self._made = 0

    def make(self, answer_tokens: int | None = None) -> Any:
        """One request, hashed as EngineCore's input thread does it."""
        from vllm import SamplingParams
        from vllm.v1.request import Request

        self._made += 1
        # Of different lengths: their blocks are not all complete in the same steps.
        length = self._prompt_tokens - self._rng.randrange(2 * BLOCK_TOKENS)
        tokens = self._rng.choices(range(VOCABULARY), k=length)
        sampling = SamplingParams(max_tokens=answer_tokens or self._prompt_tokens, ignore_eos=True)
        return Request(f"request-{self._made}", tokens, sampling, None, block_hasher=self._hasher)


def measure(bench: Bench, requests: Requests, running: int, decode_steps: int, rounds: Rounds) -> None:
    """One round: prompts are computed, all requests decode, all end."""
    from vllm.v1.request import RequestStatus

    made = [requests.make() for _ in range(running)]
    gc.collect()
    prefill = bench.phase()
    for request in made:
        bench.run(bench.scheduler.add_request, request)
    while any(request.num_output_tokens == 0 for request in made):
        bench.step()
    decode = bench.phase()
    for _ in range(decode_steps):
        bench.step()
    end = bench.phase()
    bench.drain()
    bench.run(bench.scheduler.finish_requests, [request.request_id for request in made], RequestStatus.FINISHED_ABORTED)
    bench.step()
    bench.drain()
    rounds.prefill.append(prefill)
    rounds.decode.append(decode)
    phases = (prefill, decode, end)
    rounds.whole.append(Phase(running, sum(phase.ours_ns for phase in phases), sum(phase.vllm_ns for phase in phases)))


def results(running: int, rounds: Rounds) -> list[Result]:
    """What one number of requests gave."""
    return [
        Result.of(f"prefill_step_{running}", [phase.step_us for phase in rounds.prefill], "us"),
        Result.of(f"decode_step_{running}", [phase.step_us for phase in rounds.decode], "us"),
        Result.of(f"vllm_prefill_step_{running}", [it.vllm_ns / it.steps / 1e3 for it in rounds.prefill], "us"),
        Result.of(f"vllm_decode_step_{running}", [it.vllm_ns / it.steps / 1e3 for it in rounds.decode], "us"),
        Result.of(f"prefill_share_{running}", [phase.share for phase in rounds.prefill], "ratio"),
        Result.of(f"decode_share_{running}", [phase.share for phase in rounds.decode], "ratio"),
        Result.of(f"whole_share_{running}", [phase.share for phase in rounds.whole], "ratio"),
    ]


def report(measured: dict[int, Rounds]) -> dict[str, Any]:
    """The common shape of all our benches. There is no goal: a step's larger part is not measured here."""
    rows = [row for running, rounds in measured.items() for row in results(running, rounds)]
    return {"commit": commit(), "machine": machine(), "results": [asdict(row) for row in rows], "goals": []}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the bench and prints its report."""
    parser = argparse.ArgumentParser(prog="python -m tests.vllm.step_cost", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--running", type=int, nargs="+", default=list(RUNNING), help="requests at once")
    parser.add_argument("--prompt-tokens", type=int, default=PROMPT_TOKENS)
    parser.add_argument("--decode-steps", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--events", action="store_true", help="with KVEvents, as in a fleet")
    parser.add_argument("--seed", type=int, default=20817)
    chosen = parser.parse_args(arguments)
    measured = {running: Rounds() for running in chosen.running}
    with opened(chosen.prompt_tokens, max(chosen.running), events=chosen.events) as bench:
        requests = Requests(bench, chosen.prompt_tokens, chosen.seed)
        measure(bench, requests, 1, chosen.decode_steps, Rounds())
        for _ in range(chosen.rounds):
            for running, rounds in measured.items():
                measure(bench, requests, running, chosen.decode_steps, rounds)
    made = report(measured)
    if chosen.json:
        print(json.dumps(made))
        return 0
    for row in made["results"]:
        print(f"{row['name']:24} {row['value']:12.4f} {row['unit']:5} spread {row['spread']:.4f}, {row['n']} rounds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
