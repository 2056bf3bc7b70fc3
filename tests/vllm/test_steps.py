"""What the scheduler's side reads from vLLM's own data of a step and of a model, without an engine."""

from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("vllm_installed")


def groups(*block_tokens: int) -> Any:
    from kvcellar.groups import Group, Groups

    return Groups(tuple(Group("full_attention", "full", tokens) for tokens in block_tokens), 16, 16)


def output(new: list[Any], cached: Any, **more: Any) -> Any:
    return SimpleNamespace(scheduled_new_reqs=new, scheduled_cached_reqs=cached, **more)


def cached(**fields: Any) -> Any:
    from vllm.v1.core.sched.output import CachedRequestData

    empty: dict[str, Any] = vars(CachedRequestData.make_empty())
    return CachedRequestData(**(empty | fields))


def new(block_ids: tuple[list[int], ...], computed: int, replay_start: int = 0) -> Any:
    from vllm.v1.core.sched.output import NewRequestData

    return NewRequestData("a", [], [], None, None, block_ids, computed, None, replay_start=replay_start)


def test_only_blocks_that_will_be_written_are_handed_out() -> None:
    from kvcellar.steps import handed_out

    # 40 computed tokens: two blocks of 16 and a part of the third, one of 32 and a part of the
    # second.
    step = output([new(([1, 2, 3, 4], [11, 12]), 40)], cached())
    assert handed_out(step, groups(16, 32)) == [[3, 4], [12]]
    assert handed_out(output([new(([1, 2],), 0)], cached()), groups(16)) == [[1, 2]]
    assert handed_out(output([new(([1, 2, 3],), 40, replay_start=8)], cached()), groups(16)) == [[1, 2, 3]]


def test_a_resumed_request_is_handed_its_whole_table_and_others_what_is_added() -> None:
    from kvcellar.steps import handed_out

    resumed = cached(
        req_ids=["a", "b", "c"],
        resumed_req_ids={"a"},
        new_block_ids=[([1, 2, 3],), ([7],), None],
        num_computed_tokens=[32, 96, 16],
        num_output_tokens=[0, 0, 0],
    )
    assert handed_out(output([], resumed), groups(16)) == [[3], [7]]


def test_blocks_that_vllm_zeroes_or_copies_into_are_handed_out() -> None:
    from kvcellar.steps import handed_out
    from vllm.v1.core.kv_cache_utils import KVCacheBlockCopy

    copy = KVCacheBlockCopy(src_block_id=3, dst_block_id=4)
    step = output([], cached(), new_block_ids_to_zero=[8, 9], kv_cache_block_copies=[copy])
    assert handed_out(step, groups(16)) == [[8, 9], [4]]
