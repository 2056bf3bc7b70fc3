"""What goes wrong in production: clients that hang up, preemptions, resets in the middle. Nothing may leak or fail."""

import random
import time

import pytest

from tests.deadlines import shrunk
from tests.vllm import oplog
from tests.vllm.cache_model import Replay
from tests.vllm.prompts import prompt
from tests.vllm.server import BLOCK_TOKENS, Server
from tests.vllm.traffic import abandon_together, background, complete_together


@pytest.fixture
def server(shared_server: Server) -> Server:
    """The shared server, with both caches empty."""
    shared_server.settle()
    assert shared_server.reset(external=True)
    return shared_server


def assert_clean(server: Server) -> None:
    """Nothing is held, every slot is free or filled, the server answers, and the log of all operations adds up."""
    metrics = server.settle()
    assert not metrics.leftovers()
    assert metrics.slots("free") + metrics.slots("filled") == metrics.slots("total") > 0
    assert len(server.complete([5, 6, 7], max_tokens=2).tokens) == 2
    assert server.process.poll() is None
    replay = Replay(BLOCK_TOKENS).run(server.trace())
    assert replay.hit_tokens == metrics.hit_tokens
    assert replay.tier is not None
    assert replay.tier.counts().pinned == replay.tier.counts().filling == 0


def test_clients_that_hang_up_in_the_middle_leave_nothing(server: Server, seed: int) -> None:
    rng = random.Random(f"abort-{seed}")
    prompts = [prompt(rng, rng.randint(100, 600)) for _ in range(24)]
    # From before the first step to the middle of the answer, however fast that is here.
    alone_s = seconds_of(server, prompt(rng, 350), 48)
    delays = [alone_s * rng.choice((0.002, 0.01, 0.05, 0.2, 0.6, 1.5)) * rng.uniform(0.5, 1.5) for _ in prompts]
    cut = abandon_together(server, prompts, 48, delays)
    print(f"{cut} of {len(prompts)} cut off, seed {seed}")
    assert cut > len(prompts) // 3, "hardly any client hung up in time"
    assert_clean(server)


def test_clients_that_hang_up_during_a_load_leave_nothing(server: Server, seed: int) -> None:
    rng = random.Random(f"load-{seed}")
    prompts = [prompt(rng, 600) for _ in range(4)]
    for tokens in prompts:
        server.complete(tokens, max_tokens=1)
    server.settle()
    assert_reset(server)
    # From before the load begins to after its end, however long one takes here.
    loading_s = seconds_of(server, prompts[0], 1)
    server.settle()
    begun = len(server.trace())
    cut = 0
    for round_number in range(6):
        assert_reset(server)
        delays = [loading_s * (round_number + rng.random()) / 4 for _ in prompts]
        cut += abandon_together(server, prompts, 24, delays)
        server.settle()
    loads = oplog.loaded_requests(server.trace()[begun:])
    print(f"{cut} of {6 * len(prompts)} cut off, {len(loads)} loads, seed {seed}")
    assert cut > 0, "nobody hung up in time"
    assert loads, "nothing was loaded"
    assert_clean(server)


def seconds_of(server: Server, tokens: list[int], max_tokens: int) -> float:
    """How long one request takes alone."""
    begin = time.monotonic()
    server.complete(tokens, max_tokens)
    return time.monotonic() - begin


def assert_reset(server: Server) -> None:
    assert server.reset(), "vLLM could not reset its prefix cache"


def test_preempted_requests_all_end(server: Server, seed: int) -> None:
    rng = random.Random(f"preempt-{seed}")
    # Eight requests of about 17 blocks (14 on a slow machine) against 64 blocks.
    answer_tokens = shrunk(160, 80)
    prompts = [prompt(rng, rng.randint(330, 420)) for _ in range(8)]
    before = server.settle().value("vllm:num_preemptions_total")
    together = complete_together(server, prompts, answer_tokens)
    assert server.metrics().value("vllm:num_preemptions_total") > before, "nothing was preempted"
    assert all(len(answer.tokens) == answer_tokens for answer in together)
    assert_clean(server)
    again = complete_together(server, prompts[:4], max_tokens=4)
    assert all(len(answer.tokens) == 4 for answer in again)
    assert_clean(server)


def test_a_reset_with_offloads_in_flight_succeeds(server: Server, seed: int) -> None:
    rng = random.Random(f"reset-{seed}")
    for _ in range(8):
        server.complete(prompt(rng, 700), max_tokens=1)
        # The request has ended and its last blocks are on their way out: vLLM must find none of its
        # blocks in use.
        assert_reset(server)
    assert_clean(server)


def test_a_reset_of_both_caches_with_requests_running_succeeds_and_nothing_hits(server: Server, seed: int) -> None:
    rng = random.Random(f"both-{seed}")
    known = [prompt(rng, 300) for _ in range(3)]
    for tokens in known:
        server.complete(tokens, max_tokens=1)
    server.settle()
    # Cold requests only: vLLM itself refuses this reset while any request waits for a load.
    with background(server, rng, clients=4) as load:
        while load.answers < 4 and not load.errors:
            pass_time(server)
        for _ in range(3):
            assert server.reset(running=True, external=True)
            pass_time(server)
    assert load.errors == 0
    server.settle()
    assert server.reset(running=True, external=True)
    before = server.settle()
    for tokens in known:
        server.complete(tokens, max_tokens=1)
    after = server.settle()
    assert after.hit_tokens == before.hit_tokens, "something from before the reset was found"
    assert after.local_hit_tokens == before.local_hit_tokens
    assert_reset(server)
    server.complete(known[0], max_tokens=1)
    assert server.settle().hit_tokens > after.hit_tokens, "nothing is stored after a reset"
    assert_clean(server)


def pass_time(server: Server) -> None:
    """One short request: time measured in the server's own steps."""
    server.complete([9, 8, 7], max_tokens=3)


def test_store_false_keeps_nothing(server: Server, seed: int) -> None:
    tokens = prompt(random.Random(f"store-{seed}"), 200)
    before = server.settle()
    server.complete(tokens, max_tokens=4, controls={"store": False})
    after = server.settle()
    assert after.cellar("stored_blocks_total") == before.cellar("stored_blocks_total")
    assert_reset(server)
    assert server.complete(tokens, max_tokens=4).cached_tokens == 0
    assert_clean(server)


def test_load_false_takes_nothing(server: Server, seed: int) -> None:
    tokens = prompt(random.Random(f"load-{seed}"), 200)
    server.complete(tokens, max_tokens=4)
    server.settle()
    assert_reset(server)
    assert server.complete(tokens, max_tokens=4, controls={"load": False}).cached_tokens == 0
    assert_reset(server)
    assert server.complete(tokens, max_tokens=4).cached_tokens == 192
    assert_clean(server)


def test_max_load_tokens_bounds_a_load(server: Server, seed: int) -> None:
    tokens = prompt(random.Random(f"most-{seed}"), 200)
    server.complete(tokens, max_tokens=4)
    for most, loaded in ((70, 64), (64, 64), (31, 0), (1000, 192)):
        server.settle()
        assert_reset(server)
        before = server.metrics().hit_tokens
        assert server.complete(tokens, max_tokens=4, controls={"max_load_tokens": most}).cached_tokens == loaded
        assert server.settle().hit_tokens - before == loaded
    assert_clean(server)


@pytest.mark.soak
@pytest.mark.parametrize("round_number", range(20))
def test_long_mixed_traffic_leaves_nothing(server: Server, seed: int, round_number: int) -> None:
    rng = random.Random(f"soak-{seed}-{round_number}")
    known = [prompt(rng, rng.randint(100, 900)) for _ in range(12)]
    for _ in range(6):
        asked = rng.sample(known, 6) + [prompt(rng, rng.randint(50, 700)) for _ in range(4)]
        abandon_together(server, asked, 64, [rng.expovariate(1.0) for _ in asked])
        complete_together(server, rng.sample(known, 4), max_tokens=rng.randint(1, 48))
        server.settle()
        assert server.reset(external=rng.random() < 0.3)
    assert_clean(server)
