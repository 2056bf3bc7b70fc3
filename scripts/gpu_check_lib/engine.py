"""A real vLLM engine of one cell, asked by token ids. Weights are random, the same at every start."""

import json
import os
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_check_lib.cell import BLOCK_TOKENS, SHAPES, Cell, Phase

# Longer than a step and its copies by far; a nudge makes the engine look.
SETTLE_POLL_S = 0.1
SETTLE_QUIET = 4
ATTACH_STEPS = 3
NATIVE_SETTLE_S = 0.5
NUDGE = (5, 6, 7)


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        seconds: from the request to its end.
        cached: tokens of the prompt that were not computed.
        tokens: of the answer.
        logprobs: of these tokens, as vLLM gives them.
    """

    seconds: float
    cached: int
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]

    def same(self, other: "Answer") -> bool:
        """Equal in every token and every bit of their probabilities."""
        return (self.tokens, self.logprobs) == (other.tokens, other.logprobs)


def whole_blocks(tokens: int) -> int:
    """Tokens of a prompt that a hit can give: vLLM always computes the last one."""
    return (tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS


def _model(cell: Cell) -> Path:
    """The model's folder. It is never written again: the time of its file counts in the namespace."""
    folder = Path(os.environ.get("KVCELLAR_CHECK_MODELS", tempfile.gettempdir())) / f"kvcellar-model-{cell.shape}"
    if not (folder / "config.json").exists():
        folder.mkdir(exist_ok=True)
        unfinished = folder / f"config.{os.getpid()}"
        unfinished.write_text(json.dumps(SHAPES[cell.shape].as_config()))
        unfinished.replace(folder / "config.json")
    return folder


def _compilation(cell: Cell) -> dict[str, Any]:
    """vLLM's compilation_config."""
    if cell.compiled:
        return {"mode": 3}
    if not cell.eager:
        return {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    # With Triton's attention nothing compiled is needed: where vLLM's kernels do not load under
    # this torch, these engines start all the same.
    return {"mode": 0, "custom_ops": ["none"]} if cell.backend == "TRITON_ATTN" else {"mode": 0}


class Engine:
    """A started engine."""

    def __init__(self, cell: Cell) -> None:
        from vllm import LLM

        self.cell = cell
        self._vocabulary = SHAPES[cell.shape].vocabulary
        started = time.monotonic()
        self._llm = LLM(
            model=str(_model(cell)),
            dtype="bfloat16",
            load_format="dummy",
            skip_tokenizer_init=True,
            enforce_eager=cell.eager,
            max_model_len=max(cell.lengths) + 256,
            block_size=BLOCK_TOKENS,
            max_num_seqs=64,
            max_num_batched_tokens=cell.batched_tokens,
            kv_cache_memory_bytes=cell.kv_bytes,
            # Several small engines run at a time; the number is compared with what is free and
            # bounds nothing else.
            gpu_memory_utilization=0.9 if cell.shape == "8b" else 0.1,
            attention_backend=cell.backend,
            kv_transfer_config=cell.connector(),
            enable_prefix_caching=True,
            disable_log_stats=False,
            async_scheduling=True,
            compilation_config=_compilation(cell),
            seed=0,
        )
        self.start_s = time.monotonic() - started

    def prompt(self, length: int, name: str) -> list[int]:
        """Token ids that depend on length and name alone."""
        numbers = random.Random(f"{length} {name}")
        return [numbers.randrange(5, self._vocabulary) for _ in range(length)]

    def ask(self, prompt: list[int], tokens: int = 1) -> Answer:
        """One request, alone."""
        from vllm import SamplingParams

        sampling = SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=0 if tokens > 1 else None
        )
        started = time.perf_counter()
        output = self._llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)[0]
        seconds = time.perf_counter() - started
        answer = output.outputs[0]
        logprobs = tuple(next(iter(step.values())).logprob for step in answer.logprobs or ())
        return Answer(seconds, output.num_cached_tokens or 0, tuple(answer.token_ids), logprobs)

    def crowd(self, prompts: list[list[int]], tokens: int) -> float:
        """Many requests at a time. Seconds until all have ended."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        self._llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        return time.perf_counter() - started

    def forget(self) -> None:
        """Empties vLLM's own prefix cache; a tier below it stays."""
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM could not reset its prefix cache")

    def counters(self) -> dict[str, float]:
        """What KV Cellar counted, over all labels."""
        found: dict[str, float] = {}
        for metric in self._llm.get_metrics():
            if metric.name.startswith("vllm:kvcellar_") and hasattr(metric, "value"):
                name = metric.name.removeprefix("vllm:kvcellar_")
                found[name] = found.get(name, 0.0) + float(metric.value)
        return found

    def wait_in_service(self, patience_s: float = 60.0) -> float:
        """Waits until KV Cellar stores blocks: its pool is made while vLLM serves already. Seconds it took."""
        if self.cell.phase in {Phase.PLAIN, Phase.NATIVE}:
            return 0.0
        started = time.monotonic()
        while self.counters().get("in_service") != 1:
            if time.monotonic() - started > patience_s:
                raise TimeoutError(f"KV Cellar was not in service within {patience_s:.0f} s")
            self.ask(list(NUDGE))
            time.sleep(SETTLE_POLL_S)
        # The workers attach with the next steps.
        for _ in range(ATTACH_STEPS):
            self.ask(list(NUDGE))
        return time.monotonic() - started

    def settle(self, patience_s: float = 20.0) -> None:
        """Waits until nothing is copied or written any more. Of vLLM's own connector that is not known: a pause."""
        if self.cell.phase is Phase.PLAIN:
            return
        if self.cell.phase is Phase.NATIVE:
            time.sleep(NATIVE_SETTLE_S)
            self.ask(list(NUDGE))
            return
        deadline, quiet, last = time.monotonic() + patience_s, 0, (-1.0, -1.0)
        while quiet < SETTLE_QUIET:
            if time.monotonic() > deadline:
                raise TimeoutError(f"copies did not end within {patience_s:.0f} s")
            self.ask(list(NUDGE))
            counters = self.counters()
            now = (counters.get("offload_bytes", 0.0), counters.get("spilled_bytes", 0.0))
            quiet, last = (quiet + 1, last) if now == last else (0, now)
            time.sleep(SETTLE_POLL_S)

    def close(self) -> None:
        """Ends it."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
