"""vLLM's real scheduler without a model: what a step offers, and the bench over it at a tiny size."""

import json
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.vllm import step_cost

pytestmark = pytest.mark.usefixtures("vllm_installed")
PROMPT_TOKENS = 200
MOST = 12


@pytest.fixture
def bench() -> Iterator[step_cost.Bench]:
    """A scheduler whose requests do not all fit: some wait, some are preempted."""
    with step_cost.opened(PROMPT_TOKENS, MOST, events=True, chunk_tokens=64, blocks=100) as bench:
        yield bench


def lagging(side: Any, output: Any) -> list[str]:
    """Requests of a step that have complete blocks which were not offered."""
    late = []
    for request_id in output.num_scheduled_tokens:
        known = side._requests[request_id]
        request = known.request
        # vLLM counts the step's tokens as computed once it is scheduled.
        ready = min(request.num_computed_tokens, request.num_tokens)
        complete = min(ready // step_cost.BLOCK_TOKENS, len(request.block_hashes))
        if known.offered[0] != complete:
            late.append(f"{request_id}: {known.offered[0]} of {complete}")
    return late


def test_every_block_is_offered_in_the_step_that_completes_it(bench: step_cost.Bench, seed: int) -> None:
    from vllm.v1.request import RequestStatus

    rng = random.Random(f"due-{seed}")
    requests = step_cost.Requests(bench, PROMPT_TOKENS, seed)
    side, alive, preempted = bench.scheduler.connector._scheduler, set[str](), 0
    for number in range(600):
        if len(alive) < MOST and rng.random() < 0.3:
            request = requests.make(answer_tokens=rng.randint(1, 150))
            alive.add(request.request_id)
            bench.scheduler.add_request(request)
        if alive and rng.random() < 0.02:
            bench.scheduler.finish_requests(rng.choice(sorted(alive)), RequestStatus.FINISHED_ABORTED)
        output = bench.schedule()
        assert not lagging(side, output), f"step {number}, seed {seed}"
        preempted += len(output.preempted_req_ids or ())
        bench.end_steps()
        alive &= set(bench.scheduler.requests)
    assert preempted > 0, "nothing was preempted"
    assert set(side._due._near) | set(side._due._far) <= set(side._requests) <= alive


def test_quiet_steps_ask_nothing_of_the_native_engine(bench: step_cost.Bench) -> None:
    requests = step_cost.Requests(bench, PROMPT_TOKENS, 1)
    request = requests.make(answer_tokens=100)
    bench.scheduler.add_request(request)
    side = bench.scheduler.connector._scheduler
    quiet = 0
    for _ in range(60):
        before = side._active or side._counted
        known, engine = side._requests.get(request.request_id), side._engine
        due = known is None or not known.scheduled or known.request.num_tokens + 1 >= known.next_tokens
        if not before and not due:
            side._engine = None
            quiet += 1
        bench.step()
        side._engine = engine
        assert not side._retired, "the native engine was asked in a quiet step"
    assert quiet > 10, "hardly any step was quiet"


def test_the_bench_reports_in_the_common_shape(capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--running", "1", "3", "--prompt-tokens", "100", "--decode-steps", "20", "--rounds", "2"]
    assert step_cost.main(["--json", *few]) == 0
    made = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(made) == {"commit", "machine", "results", "goals"}
    results = {result["name"]: result for result in made["results"]}
    assert all(result["n"] == 2 for result in results.values())
    for running in (1, 3):
        assert 0 < results[f"decode_step_{running}"]["value"] < results[f"vllm_decode_step_{running}"]["value"]


def test_requests_that_gain_several_tokens_in_a_step_are_looked_at_in_time(seed: int) -> None:
    from kvcellar.due import Due

    rng = random.Random(f"tokens-{seed}")
    due, computed, next_tokens = Due(), dict.fromkeys("abcdef", 100), dict.fromkeys("abcdef", 112)
    known = {name: known_request(name) for name in computed}
    for request in known.values():
        due.admitted(request)
    looked_at = 0
    for step in range(2000):
        # Accepted drafts, and now and then a request that computes a longer part again.
        most = rng.choice((1, 1, 4, 40))
        scheduled = {name: rng.randint(1, most) for name in computed if rng.random() < 0.8}
        in_step = {request.request.request_id for request in due.in_step(scheduled, sum(scheduled.values()))}
        looked_at += len(in_step)
        for name, request in known.items():
            computed[name] += scheduled.get(name, 0)
            assert computed[name] < next_tokens[name] or name in in_step, f"step {step}, seed {seed}"
            if name in in_step:
                if computed[name] >= next_tokens[name]:
                    next_tokens[name] = computed[name] - computed[name] % 16 + 16
                request.next_tokens = next_tokens[name]
                due.looked_at(request, computed[name])
    assert looked_at < 2000 * len(known) / 2, "hardly any look was saved"


def known_request(name: str) -> Any:
    """What `Due` reads of a request that decodes."""
    return SimpleNamespace(
        request=SimpleNamespace(request_id=name, num_tokens=100), scheduled=True, next_tokens=112, due=0
    )
