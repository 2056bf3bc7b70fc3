"""States of recurrences and convolutions: which of vLLM's blocks hold one that may be kept.

A request's table does not tell: most of its blocks are null, and the last one's state goes on moving. So vLLM names
each block that holds the state at an end which it keeps for later, at the step after which it does.
"""

from collections.abc import Mapping, Sequence

from vllm.v1.core.kv_cache_utils import KVCacheBlock, make_block_hash_with_group_id
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from kvcellar.groups import Groups
from kvcellar.offers import Blocks

# By group: vLLM's id of the block that holds the state at the end of each of a request's blocks.
States = Mapping[int, Mapping[int, int]]
NO_STATES: States = {}


def told(output: SchedulerOutput, groups: Groups) -> dict[str, States]:
    """What vLLM tells of a step, by request.

    It names states inside a block of tokens, too. No hash of a whole block names those, and they are left out.
    """
    if not groups.hold_states:
        return {}
    found: dict[str, States] = {}
    boundaries = getattr(output.kv_connector_block_state, "boundary_state_offloads", None) or {}
    for request_id, entries in boundaries.items():
        by_group: dict[int, dict[int, int]] = {}
        for group, block, end in entries:
            tokens = groups.groups[group].block_tokens
            if block != 0 and end > 0 and end % tokens == 0:
                by_group.setdefault(group, {})[end // tokens - 1] = block
        if by_group:
            found[request_id] = by_group
    return found


def held(states: States, request: Request, scheduled: int, groups: Groups, pool: Sequence[KVCacheBlock]) -> States:
    """Those states that are in their blocks once the step is done.

    Args:
        states: what vLLM told of the request.
        request: vLLM's request, before the step.
        scheduled: tokens that the step computes of it.
        groups: all groups.
        pool: vLLM's blocks by id.
    """
    found: dict[int, dict[int, int]] = {}
    for group, blocks in states.items():
        tokens = groups.groups[group].block_tokens
        found[group] = {
            number: block
            for number, block in blocks.items()
            if _is_named(pool[block], request, group, ((number + 1) * tokens) // groups.hash_tokens)
            and not _is_passed_over(request, scheduled, number * tokens, tokens)
        }
    return found


def _is_named(block: KVCacheBlock, request: Request, group: int, hashes: int) -> bool:
    """Whether a block still has the name of the state that it is to hold.

    With speculative decoding vLLM may free a block after it told of it and give it to another request in the same step.
    """
    if hashes > len(request.block_hashes):
        return False
    return bool(block.block_hash == make_block_hash_with_group_id(request.block_hashes[hashes - 1], group))


def _is_passed_over(request: Request, scheduled: int, begin: int, tokens: int) -> bool:
    """Whether a prefill that goes on within a block runs past its end without stopping there.

    vLLM 0.32 names that block all the same where it keeps a state of the prompt's end: it holds the state with which
    the step began.
    """
    start, end = request.num_computed_tokens, begin + tokens
    is_prefill = start < max(request.num_prompt_tokens, request.num_tokens - 1)
    is_within: bool = begin < start < end < start + scheduled
    return is_prefill and is_within


def in_a_row(states: Mapping[int, int]) -> Blocks:
    """A group's states as blocks that follow each other, null blocks in between."""
    if not states:
        return 0, []
    first, last = min(states), max(states)
    return first, [states.get(number, 0) for number in range(first, last + 1)]
