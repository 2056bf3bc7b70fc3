"""What KV Cellar makes of KV cache groups as vLLM describes them, also of models that no CPU can run."""

from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("vllm_installed")


def model_of(specs: list[Any], drafts: tuple[int, ...] = ()) -> Any:
    """vLLM's KV cache of a model with these specs, one layer a group."""
    from vllm.v1.core.kv_cache_utils import KVCacheConfig
    from vllm.v1.kv_cache_interface import KVCacheGroupSpec

    groups = [
        KVCacheGroupSpec([f"layer {number}"], spec, is_eagle_group=number in drafts)
        for number, spec in enumerate(specs)
    ]
    return KVCacheConfig(num_blocks=100, kv_cache_tensors=[], kv_cache_groups=groups)


def described(
    specs: list[Any],
    *,
    drops: bool = False,
    drafts: tuple[int, ...] = (),
    v2: bool = True,
    stages: int = 1,
    dcp: int = 1,
    pcp: int = 1,
) -> Any:
    """The groups of a model as the connector describes them."""
    from kvcellar.groups import describe

    parallel = SimpleNamespace(
        decode_context_parallel_size=dcp, prefill_context_parallel_size=pcp, pipeline_parallel_size=stages
    )
    cache = SimpleNamespace(block_size=16, enable_prefix_caching=True, prefix_match_unit=None, hash_block_size=None)
    config: Any = SimpleNamespace(
        parallel_config=parallel,
        speculative_config=SimpleNamespace(use_eagle_block_drop=lambda: True) if drops else None,
        cache_config=cache,
        use_v2_model_runner=v2,
        kv_transfer_config=None,
    )
    return describe(config, model_of(specs, drafts))


def holders(specs: list[Any], *, ranks: int, dcp: int = 1) -> list[list[int]]:
    """For each group and rank, the first rank that says to hold the same, as workers tell."""
    from kvcellar.groups import shares

    parallel = SimpleNamespace(tensor_parallel_size=ranks, decode_context_parallel_size=dcp)
    config: Any = SimpleNamespace(parallel_config=parallel)
    told = [shares(config, model_of(specs), rank) for rank in range(ranks)]
    return [[of_group.index(share) for share in of_group] for of_group in zip(*told, strict=True)]


def full(block_size: int = 16, **more: Any) -> Any:
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    return FullAttentionSpec(block_size=block_size, num_kv_heads=2, head_size=64, dtype=torch.bfloat16, **more)


def mla(block_size: int = 16, dtype: str = "bfloat16", **more: Any) -> Any:
    import torch
    from vllm.v1.kv_cache_interface import MLAAttentionSpec

    kind = getattr(torch, dtype)
    return MLAAttentionSpec(block_size=block_size, num_kv_heads=1, head_size=576, dtype=kind, max_tp_shards=1, **more)


def window(tokens: int = 64, block_size: int = 16) -> Any:
    import torch
    from vllm.v1.kv_cache_interface import SlidingWindowSpec

    return SlidingWindowSpec(
        block_size=block_size, num_kv_heads=2, head_size=64, dtype=torch.bfloat16, sliding_window=tokens
    )


def mla_window(tokens: int, block_size: int) -> Any:
    import torch
    from vllm.v1.kv_cache_interface import SlidingWindowMLASpec

    return SlidingWindowMLASpec(
        block_size=block_size,
        num_kv_heads=1,
        head_size=576,
        dtype=torch.bfloat16,
        sliding_window=tokens,
        max_tp_shards=1,
    )


def chunks(tokens: int = 64) -> Any:
    import torch
    from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec

    return ChunkedLocalAttentionSpec(
        block_size=16, num_kv_heads=2, head_size=64, dtype=torch.bfloat16, attention_chunk_size=tokens
    )


def state(mode: str = "align", **more: Any) -> Any:
    import torch
    from vllm.v1.kv_cache_interface import MambaSpec

    return MambaSpec(block_size=16, shapes=((3, 64),), dtypes=(torch.bfloat16,), mamba_cache_mode=mode, **more)


def test_kimi_linear_keeps_states_as_shards_and_its_mla_once() -> None:
    groups = described([mla(), state()])
    assert holders([mla(), state()], ranks=4) == [[0, 0, 0, 0], [0, 1, 2, 3]]
    assert [group.rule for group in groups.groups] == ["full", "state"]
    assert [group.holds_states for group in groups.groups] == [False, True]
    assert groups.written_early


def test_states_that_every_rank_has_are_kept_once() -> None:
    assert holders([full(), state(tp_replicated=True)], ranks=2) == [[0, 1], [0, 0]]


def test_layers_of_a_group_that_differ_are_copies_only_where_all_are() -> None:
    """An EAGLE draft with heads of its own beside MLA: in EngineCore, one layer stands for both."""
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

    mixed = UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs={"target": mla(), "draft": full()})
    assert holders([mixed], ranks=4) == [[0, 1, 2, 3]]
    alike = UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs={"a": mla(), "b": mla()})
    assert holders([alike], ranks=4) == [[0, 0, 0, 0]]


def test_ranks_of_a_context_parallel_group_share_the_tokens_of_a_block() -> None:
    """A block then covers the tokens of all of them. States, and whatever is not sharded, are as before."""
    specs = [full(), state()]
    groups = described(specs, dcp=2)
    assert [group.block_tokens for group in groups.groups] == [32, 16]
    assert (groups.hash_tokens, groups.hit_tokens) == (16, 32)
    assert described([full()], dcp=4).groups[0].block_tokens == 64
    assert described([full(dcp_sharded=False)], dcp=4).groups[0].block_tokens == 16


def test_only_ranks_with_the_same_heads_and_the_same_tokens_are_copies() -> None:
    assert holders([mla()], ranks=4, dcp=4) == [[0, 1, 2, 3]]
    assert holders([mla(), mla(dcp_sharded=False)], ranks=4, dcp=2) == [[0, 1, 0, 1], [0, 0, 0, 0]]
    # Two heads on eight ranks, each on four of them, which share the tokens two by two.
    assert holders([full(max_tp_shards=2)], ranks=8, dcp=2) == [[0, 1, 0, 1, 4, 5, 4, 5]]
    assert holders([full()], ranks=4, dcp=2) == [[0, 1, 2, 3]], "nobody says whether heads are copies"


def test_prefill_context_parallelism_is_refused_by_name() -> None:
    from kvcellar import UnsupportedError

    with pytest.raises(UnsupportedError, match=r"prefill_context_parallel_size of 2.*decode_context"):
        described([mla()], pcp=2)


def test_deepseek_with_an_indexer_in_another_precision_is_served() -> None:
    groups = described([mla(), mla(dtype="uint8")])
    assert [group.rule for group in groups.groups] == ["full", "full"]
    assert groups.written_early, "vLLM zeroes blocks of caches with several precisions"
    assert not described([mla(), mla(dtype="uint8")], v2=False).written_early, "its older runner tells us first"
    assert not described([mla(), mla()]).written_early


def test_windows_of_mla_and_small_blocks_of_deepseek_v4_are_served() -> None:
    groups = described([mla_window(128, 64), mla(256), mla_window(8, 4), mla_window(128, 8)])
    assert [group.window for group in groups.groups] == [128, None, 8, 128]
    assert (groups.hash_tokens, groups.hit_tokens) == (4, 256)


def test_chunks_and_sinks_are_served() -> None:
    import torch
    from vllm.v1.kv_cache_interface import SinkFullAttentionSpec

    sinks = SinkFullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.bfloat16, sink_len=32)
    groups = described([chunks(48), sinks])
    assert [group.rule for group in groups.groups] == [{"chunked_local": {"chunk": 48}}, "full"]
    assert [group.kind for group in groups.groups] == ["chunked_local_attention", "sink_full_attention"]
    assert [group.window for group in groups.groups] == [48, None], "events tell the chunk"


def test_a_draft_models_last_block_is_left_out_and_states_have_none() -> None:
    marked = described([full(), full(), state()], drops=True, drafts=(1,))
    assert [group.eagle for group in marked.groups] == [False, True, False]
    unmarked = described([full(), window(), state()], drops=True)
    assert [group.eagle for group in unmarked.groups] == [True, True, False]


def test_states_that_vllm_does_not_keep_are_refused_with_the_flag_that_changes_it() -> None:
    from kvcellar import UnsupportedError

    with pytest.raises(UnsupportedError, match="--mamba-cache-mode align"):
        described([full(), state("none")])


def test_a_vllm_that_does_not_tell_of_states_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvcellar import UnsupportedError
    from vllm.v1.core.sched import output

    monkeypatch.delattr(output, "KVConnectorBlockState")
    with pytest.raises(UnsupportedError, match=r"0\.32"):
        described([full(), state()])


def test_what_no_hash_names_is_refused_by_name() -> None:
    import torch
    from kvcellar import UnsupportedError
    from vllm.v1.kv_cache_interface import CircularBufferSpec, CrossAttentionSpec

    ring = CircularBufferSpec(block_size=16, num_kv_heads=1, head_size=64, dtype=torch.bfloat16)
    with pytest.raises(UnsupportedError, match="group 1 of kind unknown cannot be kept by its hashes"):
        described([full(), ring])
    cross = CrossAttentionSpec(block_size=16, num_kv_heads=1, head_size=64, dtype=torch.bfloat16)
    with pytest.raises(UnsupportedError, match="group 0 is of kind cross_attention"):
        described([cross])


def test_states_with_drafts_in_a_pipeline_are_refused_by_name() -> None:
    from kvcellar import UnsupportedError

    with pytest.raises(UnsupportedError, match="Pipeline parallel"):
        described([full(), state()], drops=True, stages=2)
    assert described([full(), full()], drops=True, stages=2).groups


def step(told: dict[str, list[tuple[int, int, int]]]) -> Any:
    return SimpleNamespace(kv_connector_block_state=SimpleNamespace(boundary_state_offloads=told))


def request(hashes: list[bytes], *, computed: int, prompt: int = 100) -> Any:
    return SimpleNamespace(
        block_hashes=hashes, num_computed_tokens=computed, num_prompt_tokens=prompt, num_tokens=prompt
    )


def test_states_are_taken_from_blocks_that_still_have_their_name() -> None:
    from kvcellar import states
    from vllm.v1.core.kv_cache_utils import BlockHash, make_block_hash_with_group_id

    groups = described([full(), state()])
    hashes = [bytes([number]) * 32 for number in range(6)]
    named = [make_block_hash_with_group_id(BlockHash(hashed), 1) for hashed in hashes]
    pool: Any = [SimpleNamespace(block_hash=None) for _ in range(9)]
    pool[7].block_hash, pool[8].block_hash = named[1], named[3]
    told = states.told(step({"a": [(1, 7, 32), (1, 8, 64), (1, 5, 40), (1, 0, 16)]}), groups)
    assert told == {"a": {1: {1: 7, 3: 8}}}, "ends within a block, and the null block, are left out"
    assert states.held(told["a"], request(hashes, computed=32), 32, groups, pool) == {1: {1: 7, 3: 8}}
    pool[7].block_hash = None
    assert states.held(told["a"], request(hashes, computed=32), 32, groups, pool) == {1: {3: 8}}, (
        "freed, and given away"
    )
    pool[8].block_hash = named[2]
    assert states.held(told["a"], request(hashes, computed=32), 32, groups, pool) == {1: {}}
    assert states.held(told["a"], request(hashes[:3], computed=32), 32, groups, pool) == {1: {}}, "no hash yet"


def test_a_prefill_that_runs_past_a_blocks_end_leaves_no_state_there() -> None:
    from kvcellar import states
    from vllm.v1.core.kv_cache_utils import BlockHash, make_block_hash_with_group_id

    groups = described([full(), state()])
    hashes = [bytes([number]) * 32 for number in range(6)]
    pool: Any = [SimpleNamespace(block_hash=make_block_hash_with_group_id(BlockHash(hashes[1]), 1))]
    told = {1: {1: 0}}
    kept = {1: {1: 0}}
    for computed, scheduled, left in [(16, 16, kept), (24, 8, kept), (16, 40, kept), (24, 40, {1: {}})]:
        found = states.held(told, request(hashes, computed=computed), scheduled, groups, pool)
        assert found == left, f"{scheduled} tokens from {computed}"
    decoding = request(hashes, computed=24, prompt=20)
    decoding.num_tokens = 25
    assert states.held(told, decoding, 12, groups, pool) == kept, "drafts may run past it"


def test_states_stand_in_a_row_with_null_blocks_between() -> None:
    from kvcellar.states import in_a_row

    assert in_a_row({}) == (0, [])
    assert in_a_row({5: 50, 2: 20}) == (2, [20, 0, 0, 50])
