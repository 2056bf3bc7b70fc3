"""Requests that vLLM schedules in other ways: guessed tokens, priorities, logprobs of the prompt."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vllm import reuse, tiny_models
from tests.vllm.answers import assert_identical
from tests.vllm.engine_process import start_engine
from tests.vllm.engines import Engine, open_engine
from tests.vllm.places import temporary_pool_dir
from tests.vllm.prompts import prompt
from tests.vllm.references import is_close
from tests.vllm.reuse import TINY, assert_identity, three_answers, whole_blocks
from tests.vllm.server import BLOCK_TOKENS

PROMPT_TOKENS = 6 * BLOCK_TOKENS + 5
# Few tokens that an answer may consist of: many guesses are right then, and many are wrong.
WORDS = 3
# Answers are compared that were computed in passes of other shapes: bfloat16 would round them
# apart.
OPTIONS: dict[str, Any] = {**TINY, "dtype": "float32"}
CELLAR = {"dram_size": "64MiB", "verify_loads": True}

pytestmark = [pytest.mark.usefixtures("vllm_installed"), pytest.mark.e2e]


@pytest.fixture
def rng(seed: int, request: pytest.FixtureRequest) -> random.Random:
    return random.Random(f"{request.node.name}-{seed}")


@pytest.fixture(scope="module")
def llama(vllm_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.llama(tmp_path_factory.mktemp("requests") / "llama")


@pytest.fixture
def start(llama: Path, tmp_path: Path) -> Iterator[Any]:
    def started(**options: Any) -> Any:
        options = {**OPTIONS, **options}
        return open_engine(tmp_path, pool_dir, cellar=CELLAR, model=llama, one_process=True, **options)

    with temporary_pool_dir() as pool_dir:
        yield started


def some_prompt(rng: random.Random, length: int = PROMPT_TOKENS) -> list[int]:
    return prompt(rng, length, first=0, last=tiny_models.VOCABULARY - 1)


def assert_clean(engine: Engine) -> None:
    metrics = engine.settle()
    assert not metrics.leftovers()
    assert metrics.cellar("internal_errors_total") == metrics.cellar("load_failures_total") == 0
    assert metrics.cellar("in_service") == 1


def guess(engine: Engine, tokens: list[int], words: list[int]) -> dict[str, Any]:
    """The whole way of a prompt whose answer is partly guessed, and of one that goes on after that answer."""
    found = three_answers(engine, tokens, max_tokens=2 * BLOCK_TOKENS, allowed_token_ids=words)
    metrics = engine.metrics()
    drafts, accepted = (metrics.value(f"vllm:spec_decode_num_{what}_tokens_total") for what in ("draft", "accepted"))
    # What was generated is a prefix now: a block with a rejected token in it would show here.
    longer = [*tokens, *found.cold.tokens, 7]
    ours, hit_tokens = reuse.from_us(engine, longer)
    cold = reuse.cold(engine, longer)
    assert_clean(engine)
    return {
        "found": found,
        "drafts": drafts,
        "accepted": accepted,
        "longer": longer,
        "hit": hit_tokens,
        "ours": ours,
        "cold": cold,
    }


def test_with_ngram_speculation_hits_of_ours_are_identical(llama: Path, tmp_path: Path, rng: random.Random) -> None:
    """What vLLM guesses is partly right and partly wrong, and the KV of wrong guesses must not be kept.

    In a process of its own: after numba was there, vLLM cannot start an engine in the same process any more.
    """
    tokens = some_prompt(rng)
    words = sorted(set(tokens))[:WORDS]
    guessing = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 1}
    options = {**OPTIONS, "speculative_config": guessing}
    with (
        temporary_pool_dir() as pool_dir,
        start_engine(tmp_path, pool_dir, cellar=CELLAR, model=llama, **options) as engine,
    ):
        engine.wait_ready()
        seen = engine.call(guess, tokens, words)
    assert_identity(seen["found"], tokens, "with guessed tokens")
    assert seen["drafts"] > seen["accepted"] > BLOCK_TOKENS, "all were right or all wrong: this test proves nothing"
    assert seen["hit"] == whole_blocks(seen["longer"])
    assert is_close(seen["cold"], seen["ours"]), (seen["cold"], seen["ours"])


def preempt(engine: Engine, prompts: list[list[int]], max_tokens: int) -> None:
    """Runs all at once, the later the more urgent, in a KV cache that is too small for them."""
    from vllm import SamplingParams

    core = engine.llm.llm_engine
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    for number, tokens in enumerate(prompts):
        core.add_request(f"request-{number}", {"prompt_token_ids": tokens}, params.clone(), priority=-number)
        core.step()
    while core.has_unfinished_requests():
        core.step()


def test_what_preempted_requests_stored_is_right(start: Any, rng: random.Random) -> None:
    prompts = [some_prompt(rng) for _ in range(4)]
    with start(scheduling_policy="priority", max_model_len=512, num_gpu_blocks_override=24) as engine:
        preempt(engine, prompts, max_tokens=BLOCK_TOKENS + 8)
        assert engine.metrics().value("vllm:num_preemptions_total") > 0
        # Twice: the second time vLLM resumes requests with hits of ours.
        engine.settle()
        engine.reset_gpu_cache()
        preempt(engine, prompts, max_tokens=BLOCK_TOKENS + 8)
        for tokens in prompts:
            ours, hit_tokens = reuse.from_us(engine, tokens)
            assert hit_tokens == whole_blocks(tokens)
            reuse.cold(engine, tokens)
            local = reuse.ask(engine, tokens, controls=reuse.NOTHING)
            assert local.cached_tokens == whole_blocks(tokens)
            assert is_close(local, ours), (local, ours)
        assert_clean(engine)


def prompt_logprobs(output: Any) -> list[Any]:
    first, *rest = output.prompt_logprobs
    assert first is None
    return [sorted((token, entry.logprob, entry.rank) for token, entry in position.items()) for position in rest]


def test_logprobs_of_a_prompt_whose_prefix_is_stored_are_complete_and_equal(start: Any, rng: random.Random) -> None:
    tokens = some_prompt(rng)
    with start() as engine:
        found = three_answers(engine, tokens)
        assert_identity(found, tokens, "before")
        engine.reset_gpu_cache()
        reference = reuse.output_of(engine, tokens, controls=reuse.NOTHING, prompt_logprobs=3)
        engine.reset_gpu_cache()
        output = reuse.output_of(engine, tokens, prompt_logprobs=3)
        assert len(prompt_logprobs(output)) == len(tokens) - 1
        assert prompt_logprobs(output) == prompt_logprobs(reference)
        answer, hit_tokens = reuse.from_us(engine, tokens)
        assert hit_tokens == whole_blocks(tokens)
        assert_identical(found.ours, answer, "a hit that vLLM did not want leaves everything as it was")
        assert_clean(engine)
