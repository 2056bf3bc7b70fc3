"""What an engine is asked, and what is told of it. Nothing is judged here: `serving` does, beside other engines."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_check_lib.cell import Cell, Phase, Scenario
from gpu_check_lib.engine import Answer, Engine, whole_blocks

Tell = Callable[..., None]
LOAD_ROUNDS = 2
LOAD_TOKENS = 64
LOAD_PROMPT_TOKENS = 1024


def run(engine: Engine, tell: Tell) -> None:
    """The scenario that the engine's cell names."""
    tell(start_s=round(engine.start_s, 1), in_service_s=round(engine.wait_in_service(), 1))
    scenarios = {Scenario.CORRECT: correct, Scenario.SPEED: speed, Scenario.SOAK: soak}
    scenarios[engine.cell.scenario](engine, tell)
    tell(counters=engine.counters())


def correct(engine: Engine, tell: Tell) -> None:
    """Hits of our tier answer as vLLM's own hits do, after others have taken all blocks in between."""
    cell = engine.cell
    prompts = [(length, engine.prompt(length, f"prompt {run}")) for length in cell.lengths for run in range(cell.runs)]
    references: list[Answer] = []
    for _, prompt in prompts:
        engine.ask(prompt, cell.answer_tokens)
        references.append(engine.ask(prompt, cell.answer_tokens))
    # Blocks are given to others while they are still being copied: what fences are for.
    crowd = [engine.prompt(max(cell.lengths), f"crowd {number}") for number in range(cell.crowd)]
    engine.crowd(crowd, cell.answer_tokens)
    engine.settle()
    engine.forget()
    for (length, prompt), reference in zip(prompts, references, strict=True):
        answer = engine.ask(prompt, cell.answer_tokens)
        tell(
            length=length,
            expected=whole_blocks(length),
            own_cached=reference.cached,
            cached=answer.cached,
            same=answer.same(reference),
            distinct=len(set(reference.tokens)),
        )


def soak(engine: Engine, tell: Tell) -> None:
    """`correct`, over and over with new prompts."""
    deadline, rounds, wrong, short = time.monotonic() + engine.cell.seconds, 0, 0, 0
    while time.monotonic() < deadline:
        rounds += 1
        prompts = [engine.prompt(length, f"round {rounds}") for length in engine.cell.lengths]
        references = []
        for prompt in prompts:
            engine.ask(prompt, engine.cell.answer_tokens)
            references.append(engine.ask(prompt, engine.cell.answer_tokens))
        crowd = [engine.prompt(max(engine.cell.lengths), f"{rounds} {number}") for number in range(engine.cell.crowd)]
        engine.crowd(crowd, engine.cell.answer_tokens)
        engine.forget()
        for prompt, reference in zip(prompts, references, strict=True):
            answer = engine.ask(prompt, engine.cell.answer_tokens)
            wrong += not answer.same(reference)
            short += answer.cached == 0
    tell(rounds=rounds, answers=rounds * len(engine.cell.lengths), wrong=wrong, misses=short)


def _ms(seconds: list[float]) -> dict[str, float]:
    return {
        "min": round(1e3 * min(seconds), 3),
        "median": round(1e3 * statistics.median(seconds), 3),
        "max": round(1e3 * max(seconds), 3),
        "count": len(seconds),
    }


def _fill(engine: Engine) -> None:
    """Leaves all prompts on disk, and what they answer beside them."""
    cell, expected = engine.cell, {}
    for length in cell.lengths:
        for run in range(cell.runs):
            prompt = engine.prompt(length, f"prompt {run}")
            engine.ask(prompt, cell.answer_tokens)
            answer = engine.ask(prompt, cell.answer_tokens)
            expected[f"{length} {run}"] = [answer.tokens, answer.logprobs]
    engine.settle(60.0)
    (Path(cell.store) / "expected.json").write_text(json.dumps(expected))


def _warm_up(engine: Engine) -> None:
    """Kernels are loaded and pages pinned outside of what is measured."""
    for length in engine.cell.lengths:
        for tokens in (1, 4):
            engine.ask(engine.prompt(length, "warm up"), tokens)


def speed(engine: Engine, tell: Tell) -> None:
    """Times to first token: computed, hit in vLLM's own cache, hit in a tier below; then tokens a second."""
    cell = engine.cell
    if cell.phase is Phase.FILL:
        _fill(engine)
        return
    _warm_up(engine)
    for length in cell.lengths:
        _measure(engine, length, tell)
    if cell.load_prompts and cell.phase is not Phase.NVME:
        for number in range(LOAD_ROUNDS):
            prompts = [engine.prompt(LOAD_PROMPT_TOKENS, f"load {number} {at}") for at in range(cell.load_prompts)]
            seconds = engine.crowd(prompts, LOAD_TOKENS)
            tell(load_round=number, tokens_per_s=round(cell.load_prompts * LOAD_TOKENS / seconds, 1))


def _measure(engine: Engine, length: int, tell: Tell) -> None:
    cell = engine.cell
    seconds: dict[str, list[float]] = {}
    cached: list[int] = []
    same = 0
    expected = json.loads((Path(cell.store) / "expected.json").read_text()) if cell.phase is Phase.NVME else {}
    for run in range(cell.runs):
        prompt = engine.prompt(length, f"prompt {run}")
        if cell.phase is Phase.NVME:
            # The first time it comes from disk. What it answers is compared in a second request.
            hit = engine.ask(prompt)
            tokens, logprobs = expected[f"{length} {run}"]
            reference = Answer(0.0, 0, tuple(tokens), tuple(logprobs))
        else:
            seconds.setdefault("cold", []).append(engine.ask(prompt).seconds)
            seconds.setdefault("own_hit", []).append(engine.ask(prompt).seconds)
            if cell.phase is Phase.PLAIN:
                continue
            reference = engine.ask(prompt, cell.answer_tokens)
            engine.settle()
            engine.forget()
            hit = engine.ask(prompt)
        seconds.setdefault("tier_hit", []).append(hit.seconds)
        cached.append(hit.cached)
        same += engine.ask(prompt, cell.answer_tokens).same(reference)
    tell(
        length=length,
        expected=whole_blocks(length),
        cached=sorted(set(cached)),
        same=same,
        runs=cell.runs,
        ms={name: _ms(values) for name, values in seconds.items()},
    )


def told_by(cell: Cell, tell: Tell) -> None:
    """Start the cell's engine and ask it."""
    engine = Engine(cell)
    try:
        run(engine, tell)
    finally:
        engine.close()


def line(**facts: Any) -> str:
    """What one process tells another."""
    return json.dumps(facts)
