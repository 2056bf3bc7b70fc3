"""Sessions whose input comes piece by piece: what they store is a prefix like any other, and may begin with a hit."""

import asyncio
import random
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.deadlines import deadline
from tests.vllm import oplog, tiny_models
from tests.vllm.answers import Answer
from tests.vllm.metrics import Snapshot
from tests.vllm.places import temporary_pool_dir
from tests.vllm.prompts import prompt
from tests.vllm.references import NOTHING, is_close
from tests.vllm.server import BLOCK_TOKENS, SETTLE_S, transfer_config

ANSWER_TOKENS = 5
# Pieces that end within a block, so that a session's update has to take back what it began.
PIECES = (3 * BLOCK_TOKENS + 7, BLOCK_TOKENS + 9, 2 * BLOCK_TOKENS + 3)
PIECE_S = 60.0

pytestmark = [pytest.mark.usefixtures("vllm_installed"), pytest.mark.e2e]


@dataclass
class Talk:
    """What one request, or each piece of a session, was answered with."""

    cached: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)

    def hear(self, output: Any) -> None:
        completion = output.outputs[0]
        self.cached = max(self.cached, output.num_cached_tokens or 0)
        self.tokens += completion.token_ids
        self.logprobs += [
            tuple(sorted((str(token), entry.logprob, entry.rank) for token, entry in position.items()))
            for position in completion.logprobs or ()
        ]

    def answer(self) -> Answer:
        return Answer("", tuple(self.tokens), tuple(self.logprobs), self.cached)


class Sessions:
    """An `AsyncLLM` that is asked one thing at a time."""

    def __init__(self, engine: Any, trace_file: Path) -> None:
        self._engine = engine
        self._trace_file = trace_file
        self._asked = 0

    def _params(self, max_tokens: int, controls: dict[str, bool] | None) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            ignore_eos=True,
            logprobs=5,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args={"kv_transfer_params": {"kvcellar": controls}} if controls is not None else None,
        )

    async def _run(self, what: Any, params: Any, heard: asyncio.Event | None = None, pieces: int = 1) -> Talk:
        self._asked += 1
        talk = Talk()
        async with asyncio.timeout(deadline(PIECE_S) * pieces):
            async for output in self._engine.generate(what, params, f"talk-{self._asked}"):
                talk.hear(output)
                if heard is not None and len(talk.tokens) % ANSWER_TOKENS == 0:
                    heard.set()
        return talk

    async def session(self, pieces: Sequence[list[int]], controls: dict[str, bool] | None = None) -> Talk:
        """The pieces one after another, each when the one before it has been answered."""
        from vllm.engine.protocol import StreamingInput

        heard = asyncio.Event()

        async def speak() -> AsyncGenerator[Any, None]:
            for piece in pieces:
                # vLLM adds what follows to the list that it is given.
                yield StreamingInput({"prompt_token_ids": list(piece)})
                await heard.wait()
                heard.clear()

        return await self._run(speak(), self._params(ANSWER_TOKENS, controls), heard, len(pieces))

    async def ask(self, tokens: list[int], controls: dict[str, bool] | None = None) -> Talk:
        """One ordinary request."""
        return await self._run({"prompt_token_ids": tokens}, self._params(ANSWER_TOKENS, controls))

    async def forget(self) -> None:
        """Lets all copies end, and empties vLLM's own cache."""
        async with asyncio.timeout(deadline(SETTLE_S)):
            while True:
                await self._run({"prompt_token_ids": [1, 2, 3]}, self._params(1, None))
                if oplog.outstanding(oplog.read(self._trace_file)) == 0:
                    break
                await asyncio.sleep(0.01)
        assert await self._engine.reset_prefix_cache()


async def talk(model: Path, work_dir: Path, pool_dir: Path, pieces: list[list[int]]) -> dict[str, Any]:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.reader import get_metrics_snapshot

    trace_file = work_dir / "sessions.trace.jsonl"
    cellar = {"pool_dir": str(pool_dir), "trace_file": str(trace_file), "dram_size": "64MiB", "verify_loads": True}
    arguments = AsyncEngineArgs(
        model=str(model),
        skip_tokenizer_init=True,
        enforce_eager=True,
        block_size=BLOCK_TOKENS,
        max_model_len=1024,
        max_num_seqs=4,
        max_num_batched_tokens=1024,
        # Answers are compared that were computed in passes of other shapes: bfloat16 would round
        # them apart.
        dtype="float32",
        distributed_executor_backend="uni",
        kv_cache_memory_bytes=1 << 27,
        enable_prefix_caching=True,
        kv_transfer_config=transfer_config(cellar),
    )
    engine = AsyncLLM.from_engine_args(arguments)
    try:
        sessions = Sessions(engine, trace_file)
        found: dict[str, Any] = {"cold": await sessions.session(pieces, NOTHING)}
        await sessions.forget()
        found["stored"] = await sessions.session(pieces)
        await sessions.forget()
        found["hit"] = await sessions.session(pieces)
        await sessions.forget()
        whole = [*_told(pieces, found["stored"].tokens), 7, 8, 9]
        found["whole"] = await sessions.ask(whole)
        await sessions.forget()
        found["whole cold"] = await sessions.ask(whole, NOTHING)
        await sessions.forget()
        found["metrics"] = Snapshot.of_engine(get_metrics_snapshot())
        return found
    finally:
        engine.shutdown()


def _told(pieces: list[list[int]], answered: list[int]) -> list[int]:
    """All that vLLM keeps of a session: each piece, and its answer but for the last token, which was not computed."""
    told: list[int] = []
    for number, piece in enumerate(pieces):
        told += piece + answered[number * ANSWER_TOKENS : (number + 1) * ANSWER_TOKENS - 1]
    return told


def test_sessions_are_answered_the_same_with_hits_and_leave_right_blocks(
    vllm_installed: None, tmp_path: Path, seed: int
) -> None:
    model = tiny_models.llama(tmp_path / "llama")
    rng = random.Random(f"sessions-{seed}")
    pieces = [prompt(rng, length, first=0, last=tiny_models.VOCABULARY - 1) for length in PIECES]
    with temporary_pool_dir() as pool_dir:
        found = asyncio.run(talk(model, tmp_path, pool_dir, pieces))
    assert len(found["cold"].tokens) == len(PIECES) * ANSWER_TOKENS
    assert found["stored"].tokens == found["cold"].tokens
    assert found["hit"].cached >= 3 * BLOCK_TOKENS, "the session began with no hit"
    assert is_close(found["cold"].answer(), found["hit"].answer()), (found["cold"], found["hit"])
    assert found["whole"].cached > sum(PIECES[:2]), "the session's later pieces were not stored"
    assert is_close(found["whole cold"].answer(), found["whole"].answer()), (found["whole cold"], found["whole"])
    metrics = found["metrics"]
    assert not metrics.leftovers()
    assert metrics.cellar("internal_errors_total") == metrics.cellar("load_failures_total") == 0
