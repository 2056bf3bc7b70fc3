"""What a step of vLLM's scheduler lets requests write."""

from collections.abc import Sequence

from vllm.v1.core.sched.output import SchedulerOutput

from kvcellar.groups import Groups


def handed_out(output: SchedulerOutput, groups: Groups) -> list[list[int]]:
    """Blocks that vLLM lets requests write from this step on: whoever still reads one of them has to be waited for.

    A request's table begins with what is computed already: found in vLLM's own cache, or loaded. Requests only read
    that, beside whoever copies it.
    """
    lists: list[list[int]] = []

    def hand_out(tables: Sequence[Sequence[int]], computed_tokens: int) -> None:
        for group, table in zip(groups.groups, tables, strict=True):
            lists.append(list(table[computed_tokens // group.block_tokens :]))

    for request in output.scheduled_new_reqs:
        # A replay writes sliding windows below what is computed.
        replays = getattr(request, "replay_start", 0) > 0
        hand_out(request.block_ids, 0 if replays else request.num_computed_tokens)
    cached = output.scheduled_cached_reqs
    if cached.resumed_req_ids:
        for request_id, tables, computed_tokens in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            if tables is not None:
                # A resumed request gets its whole table anew, any other one what is added to it.
                hand_out(tables, computed_tokens if request_id in cached.resumed_req_ids else 0)
    else:
        # Most decode steps add nothing to most tables.
        for tables in [tables for tables in cached.new_block_ids if tables is not None]:
            lists.extend(tables)
    zeroed = getattr(output, "new_block_ids_to_zero", None)
    if zeroed:
        # Also blocks of requests that were preempted again before the step.
        lists.append(list(zeroed))
    copies = getattr(output, "kv_cache_block_copies", None)
    if copies:
        # vLLM copies blocks itself: a hit that ends within a block goes on in a block of its own.
        lists.append([copy.dst_block_id for copy in copies])
    return lists
