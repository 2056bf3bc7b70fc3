"""What an answer has to be compared with: the same engine's own, without us, computed in passes of the same shapes."""

from collections.abc import Sequence

from tests.vllm.answers import Answer, differences
from tests.vllm.engines import Engine

# A request that neither loads from us nor stores to us.
NOTHING = {"load": False, "store": False}
# The same tokens, computed in passes of other shapes: the last bits differ.
LOGPROB_DIFFERENCE_MAX = 1e-3


def cold(engine: Engine, tokens: Sequence[int], max_tokens: int) -> Answer:
    """The answer without anybody's cache."""
    engine.reset_gpu_cache()
    return engine.complete(tokens, max_tokens, NOTHING)


def after_a_gpu_hit(engine: Engine, tokens: Sequence[int], max_tokens: int) -> Answer:
    """The answer after a hit in vLLM's own cache of everything that can be hit."""
    cold(engine, tokens, max_tokens)
    return engine.complete(tokens, max_tokens, NOTHING)


def is_close(reference: Answer, answer: Answer) -> bool:
    """Whether two answers say the same but for rounding: of the likeliest tokens the last may change places."""
    if answer.tokens != reference.tokens or len(answer.logprobs) != len(reference.logprobs):
        return False
    for expected, got in zip(reference.logprobs, answer.logprobs, strict=True):
        known = {token: value for token, value, _ in expected}
        apart = [abs(value - known[token]) for token, value, _ in got if token in known]
        if len(apart) < len(got) - 1 or max(apart) > LOGPROB_DIFFERENCE_MAX:
            return False
    return True


def from_us(engine: Engine, tokens: Sequence[int], max_tokens: int) -> tuple[int, bool]:
    """Asks with vLLM's own cache empty. Returns the tokens that we gave, and whether the answer is right.

    Right is the same to the bit where everything that can be hit was, or nothing: only then there is an answer of the
    same shape.
    """
    before = engine.settle().hit_tokens
    engine.reset_gpu_cache()
    answer = engine.complete(tokens, max_tokens)
    hit = engine.settle().hit_tokens - before
    if hit == 0:
        return hit, differences(cold(engine, tokens, max_tokens), answer) == 0
    reference = after_a_gpu_hit(engine, tokens, max_tokens)
    if reference.cached_tokens == hit:
        return hit, differences(reference, answer) == 0
    return hit, is_close(reference, answer)
