"""Rounds in which another connector loads beside ours and something goes wrong. They run in the engine's process.

A round returns what it saw; whether that is wrong, and whether it proves anything, the test decides.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from tests.vllm import oplog
from tests.vllm.engines import Engine
from tests.vllm.prompts import prompt
from tests.vllm.references import from_us
from tests.vllm.server import BLOCK_TOKENS
from tests.vllm.slow_copies import Brake
from tests.vllm.stand_in import Load, Wish, desk
from tests.vllm.tiny_models import VOCABULARY

ANSWER_TOKENS = 2
# With the null block, what one of the longest prompts takes and little more: the next request gets
# its blocks.
LONG_BLOCKS = 24
KV_BLOCKS = LONG_BLOCKS + 3
# Our copies go on so long after the blocks were handed over.
STILL_COPIED_S = 0.2
STEPS_MAX = 2000


@dataclass(frozen=True)
class Seen:
    """One round.

    Attributes:
        what: the round, with what reproduces it.
        right: whether every answer was right.
        hit_tokens: what we gave to the request that was asked again.
        proves: whether the dangerous moment was met.
    """

    what: str
    right: bool
    hit_tokens: int
    proves: bool


def _tokens(rng: random.Random, blocks: int, more: int) -> list[int]:
    return prompt(rng, blocks * BLOCK_TOKENS + more, 0, VOCABULARY - 1)


def _begin(engine: Engine, tokens: list[int], wish: Wish, **ours: bool) -> str:
    sampling = engine._sampling(ANSWER_TOKENS, None)
    sampling.extra_args = {"kv_transfer_params": {**wish.params(), "kvcellar": ours}}
    engine.llm.llm_engine.add_request(wish.name, {"prompt_token_ids": tokens}, sampling)
    return wish.name


def _step_until(engine: Engine, done: Callable[[], bool], what: str) -> None:
    for _ in range(STEPS_MAX):
        if done():
            return
        engine.llm.llm_engine.step()
    raise AssertionError(f"{what}: not within {STEPS_MAX} steps")


def _run_out(engine: Engine) -> None:
    """Steps until no request is left."""
    _step_until(engine, lambda: not engine.llm.llm_engine.has_unfinished_requests(), "requests end")


@contextmanager
def _failures_cost(engine: Engine, policy: str) -> Iterator[None]:
    """vLLM's scheduler has another `kv_load_failure_policy` meanwhile."""
    scheduler = engine.llm.llm_engine.engine_core.engine_core.scheduler
    before = scheduler.recompute_kv_load_failures
    scheduler.recompute_kv_load_failures = policy == "recompute"
    try:
        yield
    finally:
        scheduler.recompute_kv_load_failures = before


def _asked_again(engine: Engine, tokens: list[int], what: str, *, proves: bool) -> Seen:
    hit, right = from_us(engine, tokens, ANSWER_TOKENS)
    return Seen(f"{what}, {hit} tokens hit", right, hit, proves)


def aborted_while_the_other_loads(engine: Engine, name: str, rng: random.Random) -> Seen:
    """The client goes when the blocks are taken and hold foreign bytes, or what was in them before."""
    blocks = rng.randint(2, 9)
    tokens = _tokens(rng, blocks, rng.randint(1, BLOCK_TOKENS - 1))
    wish = Wish(name, blocks * BLOCK_TOKENS, bytes=rng.choice(("foreign", "none")))
    request = _begin(engine, tokens, wish)
    _step_until(engine, lambda: name in desk.loads and desk.loads[name].written, "the other's load begins")
    engine.llm.llm_engine.abort_request([request])
    # It notices late: vLLM keeps the blocks until then.
    desk.released.add(name)
    met = len(desk.loads[name].blocks) == blocks
    return _asked_again(engine, tokens, f"{name}: {blocks} blocks, {wish.bytes}", proves=met)


def failed_beside_steps(engine: Engine, name: str, rng: random.Random) -> Seen:
    """The other's load fails after it wrote half of it; vLLM lets the request fail, or computes it."""
    return _failed(engine, name, rng, beside=True)


def failed_within_a_step(engine: Engine, name: str, rng: random.Random) -> Seen:
    """The same, and vLLM has already computed with the foreign bytes when it hears of it."""
    return _failed(engine, name, rng, beside=False)


def _failed(engine: Engine, name: str, rng: random.Random, *, beside: bool) -> Seen:
    policy = rng.choice(("fail", "recompute"))
    blocks = rng.randint(2, 9)
    tokens = _tokens(rng, blocks, rng.randint(1, BLOCK_TOKENS - 1))
    wish = Wish(name, blocks * BLOCK_TOKENS, beside=beside, fails=True)
    desk.released.add(name)
    # Our copies read the blocks while vLLM computes them anew.
    slow = Brake().stutter() if rng.random() < 0.5 else nullcontext()
    with _failures_cost(engine, policy), slow:
        _begin(engine, tokens, wish)
        _run_out(engine)
    return _asked_again(engine, tokens, f"{name}: {blocks} blocks, policy {policy}", proves=desk.loads[name].written)


def loaded_into_blocks_that_we_still_copy(engine: Engine, name: str, rng: random.Random) -> Seen:
    """A request ends, and while its blocks are copied to us, they are given to a request that the other loads."""
    beside = rng.random() < 0.5
    ours = _tokens(rng, LONG_BLOCKS - rng.randint(0, 3), 0)
    other = _tokens(rng, LONG_BLOCKS, 0)
    met: list[bool] = []
    brake = Brake()

    def on_blocks(load: Load) -> None:
        # The KV cache is so small that they are nearly all of its blocks, and so were those of the
        # one that ended.
        met.append(len(load.blocks) == LONG_BLOCKS - 1 and oplog.outstanding(engine.trace()) > 0)
        brake.let_go(STILL_COPIED_S)

    engine.reset_gpu_cache()
    desk.on_blocks = on_blocks
    try:
        brake.hold()
        engine.complete(ours, 1)
        wish = Wish(name, (LONG_BLOCKS - 1) * BLOCK_TOKENS, beside=beside)
        desk.released.add(name)
        _begin(engine, other, wish)
        _run_out(engine)
    finally:
        desk.on_blocks = lambda load: None
        brake.let_go()
    what = f"{name}: {'beside' if beside else 'within'} a step, {len(ours) // BLOCK_TOKENS} blocks"
    return _asked_again(engine, ours, what, proves=any(met))


def loaded_late_and_rightly(engine: Engine, name: str, rng: random.Random) -> Seen:
    """The other keeps a prompt and loads it after some steps; a longer one is answered with it, and comes from us."""
    blocks = rng.randint(2, 7)
    start = _tokens(rng, blocks, 0)
    longer = start + _tokens(rng, rng.randint(1, 5), rng.randint(1, BLOCK_TOKENS - 1))
    kept = f"{name}-kept"
    engine.reset_gpu_cache()
    _begin(engine, start, Wish(f"{name}-first", keeps=kept))
    _run_out(engine)
    engine.settle()
    engine.reset_gpu_cache()
    wish = Wish(name, blocks * BLOCK_TOKENS, bytes="kept", kept=kept)
    # We have its start, too, and may be asked first.
    _begin(engine, longer, wish, load=False)
    _step_until(engine, lambda: name in desk.loads, "the other's load begins")
    for _ in range(rng.randint(0, 5)):
        engine.llm.llm_engine.step()
    desk.released.add(name)
    _run_out(engine)
    met = desk.loads[name].told
    return _asked_again(engine, longer, f"{name}: {blocks} blocks of {len(longer)} tokens", proves=met)


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        aborted_while_the_other_loads,
        failed_beside_steps,
        failed_within_a_step,
        loaded_into_blocks_that_we_still_copy,
        loaded_late_and_rightly,
    )
}


def rounds(engine: Engine, scenario: str, seed: int, count: int) -> list[Seen]:
    """Plays a scenario so many times."""
    seen = []
    for number in range(count):
        name = f"{scenario}-{seed}-{number}"
        seen.append(SCENARIOS[scenario](engine, name, random.Random(name)))
        desk.loads.clear()
        desk.released.clear()
    return seen


def leftovers(engine: Engine) -> dict[str, float]:
    """What is held although nothing runs."""
    return engine.settle().leftovers()
