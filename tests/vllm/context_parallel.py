"""Decode context parallelism on vLLM's CPU build, which has no kernels for it: a worker that brings them.

The tokens of a block lie on all ranks in turn. What is vLLM's own: the scheduler, block tables, hashes, configuration.
What is here: the mapping of tokens to slots, and attention over the KV of all ranks, brought together by gloo.
"""

import itertools
from typing import Any

import torch
from vllm.distributed.parallel_state import get_dcp_group
from vllm.triton_utils.dispatcher import register_kernels
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl
from vllm.v1.worker.cpu_worker import CPUWorker


def places(positions: torch.Tensor, block: int, ranks: int, interleave: int) -> tuple[torch.Tensor, ...]:
    """For each position: its place in the block table, the rank that has it, and its place in that rank's block."""
    within = positions % (block * ranks)
    rank = within // interleave % ranks
    offset = within // (interleave * ranks) * interleave + within % interleave
    return positions // (block * ranks), rank, offset


# As vLLM calls it.
def slot_mapping(  # noqa: PLR0917
    num_tokens: int,
    max_num_tokens: int,
    query_start_loc: torch.Tensor,
    positions: torch.Tensor,
    block_table: torch.Tensor,
    block_table_stride: int,
    slots: torch.Tensor,
    KV_CACHE_BLOCK_SIZE: int,  # noqa: N803
    TOTAL_CP_WORLD_SIZE: int = 1,  # noqa: N803
    TOTAL_CP_RANK: int = 0,  # noqa: N803
    CP_KV_CACHE_INTERLEAVE_SIZE: int = 1,  # noqa: N803
    *_more: Any,
    **_named: Any,
) -> None:
    """Slots of the tokens that this rank keeps; -1 for those of others."""
    slots.fill_(-1)
    starts = query_start_loc.tolist()
    for request, (start, end) in enumerate(itertools.pairwise(starts)):
        index, rank, offset = places(
            positions[start:end], KV_CACHE_BLOCK_SIZE, TOTAL_CP_WORLD_SIZE, CP_KV_CACHE_INTERLEAVE_SIZE
        )
        own = block_table[request, index].long() * KV_CACHE_BLOCK_SIZE + offset
        slots[start:end] = torch.where(rank == TOTAL_CP_RANK, own, -1)


def write(_impl: Any, _layer: Any, key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: Any) -> None:
    """Keeps what is this rank's. The cache has shape [blocks, heads, block, 2 * head]."""
    (rows,) = torch.nonzero(slots[: len(key)] >= 0, as_tuple=True)
    block = cache.shape[2]
    at = slots[rows] // block, slots[rows] % block
    cache[at[0], :, at[1], :] = torch.cat([key[rows], value[rows]], dim=-1).to(cache.dtype)


def reading(interleave: int) -> Any:
    """Attention of each request over all of its tokens, whichever rank has them."""

    # As vLLM calls it.
    def read(
        impl: Any,
        _layer: Any,
        query: torch.Tensor,
        _key: torch.Tensor,
        _value: torch.Tensor,
        cache: torch.Tensor,
        metadata: Any,
        output: torch.Tensor,
        *_more: Any,
        **_named: Any,
    ) -> torch.Tensor:
        if metadata is None:
            return output
        group, block = get_dcp_group(), cache.shape[2]
        starts, lengths = metadata.query_start_loc.tolist(), metadata.seq_lens.tolist()
        for request, length in enumerate(lengths):
            rows = slice(starts[request], starts[request + 1])
            index, rank, offset = places(torch.arange(length), block, group.world_size, interleave)
            blocks = metadata.block_table[request, : int(index[-1]) + 1].long()
            own = cache[blocks].contiguous()
            everywhere = group.all_gather(own, dim=0).view(group.world_size, *own.shape)
            keys, values = everywhere[rank, index, :, offset, :].float().chunk(2, dim=-1)
            shape = (rows.stop - rows.start, impl.num_heads, impl.head_size)
            mask = torch.ones(shape[0], length, dtype=torch.bool).tril(length - shape[0])
            found = torch.nn.functional.scaled_dot_product_attention(
                query[rows].view(shape).float().transpose(0, 1),
                keys.transpose(0, 1),
                values.transpose(0, 1),
                attn_mask=mask,
                scale=impl.scale,
                enable_gqa=True,
            )
            output[rows] = found.transpose(0, 1).reshape(output[rows].shape).to(output.dtype)
        return output

    return read


class Worker(CPUWorker):  # type: ignore[misc]  # vLLM is not typed for us
    """vLLM's CPU worker with these kernels."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        """Puts them in the place of vLLM's, which refuse."""
        register_kernels({"vllm.v1.worker.block_table.ComputeSlotMappingKernel.kernel": slot_mapping})
        CPUAttentionBackendImpl.supports_dcp = True
        CPUAttentionBackendImpl.can_return_lse_for_decode = True
        CPUAttentionBackendImpl.do_kv_cache_update = write
        CPUAttentionBackendImpl.forward = reading(vllm_config.parallel_config.cp_kv_cache_interleave_size)
        super().__init__(vllm_config, *args, **kwargs)
