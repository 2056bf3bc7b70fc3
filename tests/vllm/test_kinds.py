"""Kinds of KV cache groups beside full attention and sliding windows: states of recurrences, chunks of attention.

One tiny random model of each kind on the real vLLM. What vLLM's own prefix cache finds is what our tiers must find, and
what follows must be the same to the last bit.
"""

import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.python.index_server import index_server
from tests.vllm import cache_model, cpu_kernels, tiny_models
from tests.vllm.answers import Answer, assert_identical, differences
from tests.vllm.engines import Engine, Turn, open_engine
from tests.vllm.kinds import KINDS, Kind
from tests.vllm.metrics import Snapshot
from tests.vllm.places import temporary_disk_dir, temporary_pool_dir
from tests.vllm.processes import wait_until
from tests.vllm.prompts import Conversation, prompt
from tests.vllm.sizes import kv_mib

ANSWER_TOKENS = 8
# Long prompts are computed in several steps, each of which ends with a block where there are
# states.
CHUNK_TOKENS = 256
LANES = 8
SLOTS = 60


@dataclass(frozen=True)
class Model:
    """A tiny model on disk."""

    name: str
    path: Path
    kind: Kind


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, vllm_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """One model of each kind."""
    cpu_kernels.mamba2_prefill_checkpoints()
    kind = KINDS[request.param]
    return Model(request.param, kind.make(tmp_path_factory.mktemp(request.param)), kind)


@pytest.fixture(autouse=True)
def engines_begin_here(vllm_installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines of these tests live in this process, which began before their models were written."""
    from kvcellar import weights

    monkeypatch.setattr(weights, "process_start_ns", time.time_ns)


@contextmanager
def started(model: Model, work_dir: Path, cellar: dict[str, object], **more: Any) -> Iterator[Engine]:
    options: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "max_num_batched_tokens": CHUNK_TOKENS,
        "max_model_len": 1000,
        "one_process": True,
        "num_gpu_blocks_override": 400,
        "dtype": model.kind.dtype,
        **more,
    }
    settings = {"verify_loads": True, "load_policy": "always", "namespace_salt": "kinds", **cellar}
    with (
        temporary_pool_dir() as pool_dir,
        open_engine(work_dir, pool_dir, cellar=settings, model=model.path, **options) as engine,
    ):
        yield engine


def block_tokens(engine: Engine) -> int:
    """Tokens of a block, at whose ends hits end: vLLM chooses them so that all groups have pages of one size."""
    scheduler = engine.llm.llm_engine.engine_core.engine_core.scheduler
    sizes = {group.kv_cache_spec.block_size for group in scheduler.kv_cache_config.kv_cache_groups}
    assert len(sizes) == 1
    return int(sizes.pop())


def prompts(engine: Engine, seed: int) -> list[list[int]]:
    """Prompts of some blocks, one token less, and one more."""
    rng = random.Random(seed)
    lengths = [blocks * block_tokens(engine) + more for blocks in (1, 2, 5) for more in (0, 1, -1)]
    return [prompt(rng, length, 10, tiny_models.VOCABULARY - 1) for length in lengths]


def cold_and_gpu(engine: Engine, asked: list[list[int]]) -> list[Answer]:
    """Each prompt thrice: the last answer comes after the longest hit that vLLM's own cache can give.

    The second request may show vLLM 0.31 where prompts part, and make it keep a state there.
    """
    answers = []
    for tokens in asked:
        assert engine.complete(tokens, ANSWER_TOKENS).cached_tokens == 0
        engine.complete(tokens, ANSWER_TOKENS)
        answers.append(engine.complete(tokens, ANSWER_TOKENS))
    assert sum(answer.cached_tokens > 0 for answer in answers) >= len(asked) // 2, "vLLM's own cache finds too little"
    return answers


def hit_tokens(metrics: Snapshot) -> int:
    return sum(int(metrics.cellar("hit_tokens_total", tier=tier)) for tier in ("dram", "nvme"))


def after_our_hits(engine: Engine, asked: list[list[int]]) -> list[Answer]:
    """Each prompt once more with vLLM's own cache empty."""
    answers = []
    for tokens in asked:
        engine.reset_gpu_cache()
        answers.append(engine.complete(tokens, ANSWER_TOKENS))
    return answers


def assert_equal_hits(engine: Engine, asked: list[list[int]], references: list[Answer], what: str) -> None:
    """Our tiers find as much as vLLM's own cache did, and the same answers follow, bit for bit."""
    before = hit_tokens(engine.settle())
    answers = after_our_hits(engine, asked)
    for tokens, reference, answer in zip(asked, references, answers, strict=True):
        assert answer.cached_tokens == reference.cached_tokens, f"{what}, {len(tokens)} tokens"
        assert_identical(reference, answer, f"{what}, {len(tokens)} tokens")
    metrics = engine.settle()
    assert hit_tokens(metrics) - before == sum(reference.cached_tokens for reference in references), what
    assert metrics.cellar("verified_loads_total") > 0
    assert metrics.cellar("load_failures_total") == 0
    assert not metrics.leftovers()


def test_hits_are_those_of_vllm_itself_also_from_disk_after_a_restart(model: Model, tmp_path: Path, seed: int) -> None:
    with temporary_disk_dir() as disk:
        nvme = {"nvme_dir": str(disk), "nvme_size": kv_mib(256), "write_through": True}
        with started(model, tmp_path, {"dram_size": kv_mib(64), **nvme}) as engine:
            groups = engine.llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups
            assert tuple(type(group.kv_cache_spec).__name__ for group in groups) == model.kind.specs
            asked = prompts(engine, seed)
            references = cold_and_gpu(engine, asked)
            assert_equal_hits(engine, asked, references, f"{model.name} from memory, seed {seed}")
        # The pool of the first engine is gone with its directory.
        with started(model, tmp_path, {"dram_size": kv_mib(64), **nvme}, name="again") as engine:
            assert_equal_hits(engine, asked, references, f"{model.name} from disk, seed {seed}")
            assert engine.metrics().cellar("hit_tokens_total", tier="nvme") > 0


def test_the_index_says_how_far_a_hit_will_go(model: Model, tmp_path: Path, seed: int) -> None:
    """From the events of our tiers alone: every group counts by what it needs of a prefix."""
    from vllm.config.kv_events import KVEventsConfig

    with temporary_pool_dir() as sockets:
        published = {"endpoint": f"ipc://{sockets}/events", "replay_endpoint": f"ipc://{sockets}/replay"}
        events = KVEventsConfig(enable_kv_cache_events=True, publisher="zmq", **published)
        source = f"name=a,endpoint={published['endpoint']},replay={published['replay_endpoint']}"
        with (
            index_server("--engine", source) as server,
            started(model, tmp_path, {"dram_size": kv_mib(64)}, kv_events_config=events) as engine,
        ):
            asked = prompts(engine, seed)
            cold_and_gpu(engine, asked)
            engine.settle()

            def usable(tokens: list[int]) -> Counter[str]:
                """Blocks by tier, and tokens in all. vLLM computes the last token of a prompt in any case."""
                rows = server.post("/v1/score", {"prompt": {"tokens": tokens[:-1]}})["engines"]
                return sum((Counter(row["tiers"], tokens=row["tokens"]) for row in rows), Counter())

            wait_until(lambda: usable(asked[-1])["gpu"] > 0, "the events of vLLM's own cache")
            for tokens in asked:
                engine.reset_gpu_cache()
                engine.settle()
                # Events keep their order: with this one, all of our tiers' have arrived.
                wait_until(lambda tokens=tokens: usable(tokens)["gpu"] == 0, "the end of vLLM's own blocks")
                told = usable(tokens)["tokens"]
                assert told == engine.complete(tokens, ANSWER_TOKENS).cached_tokens, f"{len(tokens)} tokens"


def distance(engine: Engine, turn: Turn) -> float:
    """How far the first logprobs of an answer are from those of the same prompt, computed alone and in full."""
    engine.reset_gpu_cache()
    alone = engine.complete(turn.prompt, 1, {"load": False, "store": False})
    assert alone.cached_tokens == 0
    (ours, *_), (theirs,) = turn.answer.logprobs, alone.logprobs
    other = {token: value for token, value, _ in theirs}
    return max(abs(value - other[token]) for token, value, _ in ours if token in other)


def test_eight_conversations_with_preemption_agree_with_the_replay(model: Model, tmp_path: Path, seed: int) -> None:
    """The recorded order of operations, fed to the model: every hit and eviction, exactly. One request is aborted."""
    dram, few = SLOTS * model.kind.slot_kib * 1024, model.kind.few_blocks
    with started(model, tmp_path, {"dram_size": dram}, num_gpu_blocks_override=few) as engine:
        tokens = block_tokens(engine)
        vocabulary = (10, tiny_models.VOCABULARY - 1)
        for turn in range(2):
            rng = random.Random(f"{seed}-{turn}")
            leaving = prompt(rng, 5 * tokens, *vocabulary)
            engine.llm.llm_engine.add_request("leaves", {"prompt_token_ids": leaving}, engine._sampling(8, None))
            engine.llm.llm_engine.step()
            engine.llm.llm_engine.abort_request(["leaves"])
            lanes = [
                Conversation(random.Random(f"{seed}-{lane}"), (tokens, 2 * tokens), 8 * tokens, words=vocabulary)
                for lane in range(LANES)
            ]
            turns = engine.converse(lanes, tokens)
        metrics = engine.settle()
        replay = cache_model.Replay(tokens, model.kind.needs).run(engine.trace())
        apart = max(distance(engine, turn) for turn in turns)
    said = f"{replay.hit_tokens} hit tokens, {replay.evicted_blocks} evictions, seed {seed}"
    preemptions = metrics.value("vllm:num_preemptions_total")
    print(said, preemptions, "preemptions, logprobs apart by at most", apart)
    assert preemptions > 0, said
    assert model.kind.noise is None or apart <= model.kind.noise, said
    assert metrics.hit_tokens == replay.hit_tokens > 0, said
    assert metrics.cellar("evicted_blocks_total", tier="dram") == replay.evicted_blocks > 0, said
    assert metrics.cellar("load_failures_total") == 0
    assert metrics.cellar("invariant_violations_total") == 0
    assert not metrics.leftovers()


@pytest.mark.parametrize("mutant", ["LateStatesConnector", "SwappedGroupsConnector"])
def test_a_wrong_state_or_group_is_seen(model: Model, mutant: str, tmp_path: Path, seed: int) -> None:
    """The permanent mutation test: if this comparison finds nothing, the one above proves nothing."""
    states = "MambaSpec" in model.kind.specs
    if states != (mutant == "LateStatesConnector"):
        pytest.skip("this mutant breaks another kind")
    wrong = {"kv_connector": mutant, "kv_connector_module_path": "tests.vllm.mutants"}
    with started(model, tmp_path, {"dram_size": kv_mib(64), "namespace_salt": mutant}, transfer=wrong) as engine:
        asked = prompts(engine, seed)
        references = cold_and_gpu(engine, asked)
        engine.settle()
        answers = after_our_hits(engine, asked)
    pairs = list(zip(references, answers, strict=True))
    differing = sum(ours.cached_tokens > 0 and differences(vllms, ours) > 0 for vllms, ours in pairs)
    print(f"{differing} of {len(asked)} answers differ under {mutant}, seed {seed}")
    assert differing > 0
