"""What `scripts/quickstart --disaggregated` asks of its engines, and what it makes of answers. No engine is started."""

import io
import json
from dataclasses import dataclass, field
from typing import Any

import pytest

pytest.importorskip("rich")
pytest.importorskip("tokenizers")
pytest.importorskip("prometheus_client")

from quickstart_lib.cache_size import BLOCK_TOKENS
from quickstart_lib.client import Answer
from quickstart_lib.disaggregated import arguments, engines
from quickstart_lib.disaggregated import run as disaggregated
from quickstart_lib.disaggregated.engines import Pair
from quickstart_lib.failure import QuickstartError
from rich.console import Console

PROMPT = list(range(4 * BLOCK_TOKENS + 1))
ALWAYS = 1 << 30


def given(*more: str) -> arguments.DisaggregatedArguments:
    return arguments.parse(["--disaggregated", "--dtype", "float32", *more])


@dataclass
class FakeEngine:
    """Keeps what it computed itself, as an engine with KV Cellar does.

    Attributes:
        fetches: how many times NIXL works before it fails.
        lies: a hit of ours changes the answer.
    """

    fetches: int = ALWAYS
    lies: bool = False
    kept: set[tuple[int, ...]] = field(default_factory=set)
    cached: set[tuple[int, ...]] = field(default_factory=set)
    hits: int = 0
    external: int = 0

    def _compute(self, prompt: list[int]) -> bool:
        key = tuple(prompt)
        loaded = key in self.kept and key not in self.cached
        if loaded:
            self.hits += len(prompt) - 1
            self.external += len(prompt) - 1
        self.kept.add(key)
        self.cached.add(key)
        return loaded

    def hand_over(self, prompt: list[int]) -> dict[str, Any]:
        self._compute(prompt)
        return {"remote_block_ids": [1]}

    def complete(self, prompt: list[int], output_tokens: int, params: dict[str, Any] | None = None) -> Answer:
        loaded = False
        if params is None:
            loaded = self._compute(prompt)
        elif self.fetches > 0:
            self.fetches -= 1
            self.external += len(prompt) - 1
        text = "wrong" if loaded and self.lies else "right"
        return Answer(0.1, text, tuple(range(output_tokens)), ((("a", -1.0),),) * output_tokens, 0)

    def reset_prefix_cache(self) -> None:
        self.cached.clear()

    def metrics_text(self) -> str:
        return (
            f'vllm:kvcellar_hit_tokens_total{{tier="dram"}} {self.hits}\n'
            f"vllm:external_prefix_cache_hits_total {self.external}\n"
        )


def played(decode: FakeEngine) -> disaggregated.HandOver:
    pair: Any = Pair(FakeEngine(), decode)  # type: ignore[arg-type]
    way = disaggregated.HandOver(given(), pair, Console(file=io.StringIO()))
    way.play([PROMPT, [*PROMPT[:-1], 7]])
    return way


def test_every_prompt_leaves_one_token_to_compute_after_a_hit() -> None:
    lengths = disaggregated.lengths(given("--probes", "5", "--probe-tokens", "100"))
    assert lengths == [129, 161, 193, 225, 257]
    assert all(length % BLOCK_TOKENS == 1 for length in lengths)


def test_each_engine_has_nixl_in_its_role_and_ours_after_it() -> None:
    transfer = json.loads(engines.transfer("decode", dram_size="1GiB"))
    nixl, ours = transfer["kv_connector_extra_config"]["connectors"]
    assert (transfer["kv_role"], nixl["kv_role"], nixl["kv_connector"]) == (
        "kv_consumer",
        "kv_consumer",
        "NixlConnector",
    )
    assert ours["kv_connector_extra_config"]["dram_size"] == "1GiB"


def test_a_prompt_is_asked_for_from_every_source() -> None:
    way = played(FakeEngine())
    disaggregated.judge(way.measured, way.missed)
    assert list(way.measured.sources) == list(disaggregated.MEANINGS)
    assert way.measured.pairs_compared == 6
    assert way.measured.sources[disaggregated.DECODE_HIT].hits.dram == 2 * (len(PROMPT) - 1)


def test_what_nixl_did_not_bring_is_named() -> None:
    way = played(FakeEngine(fetches=1))
    with pytest.raises(QuickstartError, match=r"prompt 0, prefill_dram_hit: 0 tokens instead of 128"):
        disaggregated.judge(way.measured, way.missed)


def test_another_answer_is_named() -> None:
    way = played(FakeEngine(lies=True))
    with pytest.raises(QuickstartError, match="outputs differ: prompt 0, decode_dram_hit"):
        disaggregated.judge(way.measured, way.missed)
