"""One request of any kind, and the proof that our hit gives the answer that vLLM's own hit gives.

For features that `Engine.complete` knows nothing of: adapters, images, prompt logprobs. The functions here are also run
in an engine's own process (`EngineProcess.call`), so that a restart is one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.vllm.answers import Answer, assert_identical
from tests.vllm.engines import Engine
from tests.vllm.server import BLOCK_TOKENS

ANSWER_TOKENS = 6
# For engines of tests.vllm.tiny_models, whose prompts are token ids.
TINY: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "max_num_batched_tokens": 1024,
    "kv_cache_memory_bytes": 1 << 27,
}
NOTHING = {"load": False, "store": False}


@dataclass(frozen=True)
class Reuse:
    """A prompt's three answers.

    Attributes:
        cold: computed whole.
        local: after vLLM's own hit, or `None` where vLLM reuses nothing itself.
        ours: after a hit of ours, with vLLM's own cache empty.
        hit_tokens: how many tokens we gave for it.
    """

    cold: Answer
    local: Answer | None
    ours: Answer
    hit_tokens: int


def whole_blocks(tokens: Sequence[int]) -> int:
    """The longest hit of a prompt: the last block boundary that leaves a token to compute."""
    return (len(tokens) - 1) // BLOCK_TOKENS * BLOCK_TOKENS


def ask(
    engine: Engine, prompt: Any, *, lora: Any = None, controls: dict[str, object] | None = None, **sampling: Any
) -> Answer:
    """One request, alone, to its end."""
    return Answer.of_output(output_of(engine, prompt, lora=lora, controls=controls, **sampling))


def output_of(
    engine: Engine, prompt: Any, *, lora: Any = None, controls: dict[str, object] | None = None, **sampling: Any
) -> Any:
    """As `ask`, vLLM's own `RequestOutput`.

    Args:
        engine: the engine.
        prompt: token ids, or a prompt of vLLM's.
        lora: the adapter as vLLM's `LoRARequest`.
        controls: what we are told in `kv_transfer_params`.
        sampling: further `SamplingParams`.

    """
    from vllm import SamplingParams

    extra = {"kv_transfer_params": {"kvcellar": controls}} if controls is not None else None
    wishes = {"temperature": 0.0, "max_tokens": ANSWER_TOKENS, "logprobs": 5, "ignore_eos": True, **sampling}
    params = SamplingParams(**wishes, detokenize=engine.detokenize, extra_args=extra)
    given = prompt if isinstance(prompt, dict) else {"prompt_token_ids": list(prompt)}
    (output,) = engine.llm.generate([given], params, use_tqdm=False, lora_request=lora)
    return output


def from_us(engine: Engine, prompt: Any, **how: Any) -> tuple[Answer, int]:
    """Asks with vLLM's own cache empty. Returns the answer and how many tokens we gave."""
    before = engine.settle().hit_tokens
    engine.reset_gpu_cache()
    answer = ask(engine, prompt, **how)
    return answer, engine.settle().hit_tokens - before


def cold(engine: Engine, prompt: Any, **how: Any) -> Answer:
    """The answer without anybody's cache; nothing is stored."""
    engine.reset_gpu_cache()
    return ask(engine, prompt, controls=NOTHING, **how)


def three_answers(engine: Engine, prompt: Any, *, local_hits: bool = True, **how: Any) -> Reuse:
    """Cold, after vLLM's own hit (unless it has none), and after ours."""
    engine.reset_gpu_cache()
    first = ask(engine, prompt, **how)
    local = ask(engine, prompt, **how) if local_hits else None
    ours, hit_tokens = from_us(engine, prompt, **how)
    return Reuse(first, local, ours, hit_tokens)


def assert_identity(reuse: Reuse, tokens: Sequence[int], what: str) -> None:
    """We gave every block that can be hit, and the answer is that after vLLM's own hit, to the bit."""
    assert reuse.cold.cached_tokens == 0, f"{what}: the first request was not cold"
    assert reuse.local is not None
    assert reuse.local.cached_tokens == whole_blocks(tokens), f"{what}: the reference was no hit in vLLM's own cache"
    assert reuse.hit_tokens == reuse.ours.cached_tokens == whole_blocks(tokens), f"{what}: no whole hit of ours"
    assert_identical(reuse.local, reuse.ours, what)
