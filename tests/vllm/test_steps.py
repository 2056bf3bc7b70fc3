"""What the scheduler's side reads from vLLM's own data of a step and of a model, without an engine."""

from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("vllm_installed")


def groups(*block_tokens: int) -> Any:
    from kvcellar.groups import Group, Groups

    return Groups(tuple(Group("full_attention", tokens, None, 0, False) for tokens in block_tokens), 16, 16)


def output(new: list[Any], cached: Any) -> Any:
    return SimpleNamespace(scheduled_new_reqs=new, scheduled_cached_reqs=cached)


def cached(**fields: Any) -> Any:
    from vllm.v1.core.sched.output import CachedRequestData

    empty: dict[str, Any] = vars(CachedRequestData.make_empty())
    return CachedRequestData(**(empty | fields))


def new(block_ids: tuple[list[int], ...], computed: int, replay_start: int = 0) -> Any:
    from vllm.v1.core.sched.output import NewRequestData

    return NewRequestData("a", [], [], None, None, block_ids, computed, None, replay_start=replay_start)


def test_only_blocks_that_will_be_written_are_handed_out() -> None:
    from kvcellar.scheduler import handed_out

    # 40 computed tokens: two blocks of 16 and a part of the third, one of 32 and a part of the
    # second.
    step = output([new(([1, 2, 3, 4], [11, 12]), 40)], cached())
    assert handed_out(step, groups(16, 32)) == [[3, 4], [12]]
    assert handed_out(output([new(([1, 2],), 0)], cached()), groups(16)) == [[1, 2]]
    assert handed_out(output([new(([1, 2, 3],), 40, replay_start=8)], cached()), groups(16)) == [[1, 2, 3]]


def test_a_resumed_request_is_handed_its_whole_table_and_others_what_is_added() -> None:
    from kvcellar.scheduler import handed_out

    resumed = cached(
        req_ids=["a", "b", "c"],
        resumed_req_ids={"a"},
        new_block_ids=[([1, 2, 3],), ([7],), None],
        num_computed_tokens=[32, 96, 16],
        num_output_tokens=[0, 0, 0],
    )
    assert handed_out(output([], resumed), groups(16)) == [[3], [7]]


def test_blocks_that_are_zeroed_before_we_are_told_are_refused_by_name() -> None:
    from kvcellar import UnsupportedError
    from kvcellar.groups import describe

    parallel = SimpleNamespace(decode_context_parallel_size=1, prefill_context_parallel_size=1)
    model: Any = SimpleNamespace(kv_cache_groups=[object()], needs_kv_cache_zeroing=True)
    config: Any = SimpleNamespace(parallel_config=parallel, use_v2_model_runner=True)
    with pytest.raises(UnsupportedError, match="VLLM_USE_V2_MODEL_RUNNER=0"):
        describe(config, model)
