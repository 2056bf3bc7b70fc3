"""What attention does to the KV cache, told to the stub's checker: which blocks each step writes, and which it reads.

Taken from the slot mapping and block tables that vLLM itself hands to its Triton backend. Before a step's first access
the compute stream gets as far as it was told to wait, as on a device: a fence that vLLM's stream keeps is kept here.
"""

from typing import Any

import torch

from tests.vllm.stub_cuda.device import Driver
from tests.vllm.stub_cuda.torch_cuda import Stream


def _spans(cache: torch.Tensor, blocks: list[int]) -> list[tuple[int, int]]:
    """The pieces of memory of these blocks of one layer: address and length, in bytes.

    Heads may lie apart from each other, and other layers between them.
    """
    size = cache.element_size()
    stride, rest = cache.stride(0) * size, cache[0]
    if sum((length - 1) * step for length, step in zip(rest.shape, rest.stride(), strict=True)) + 1 == rest.numel():
        return [(cache.data_ptr() + block * stride, rest.numel() * size) for block in blocks]
    return [span for head in range(cache.shape[1]) for span in _spans(cache[:, head], blocks)]


def _written(slots: torch.Tensor, block_tokens: int) -> list[int]:
    """Blocks with a slot that is filled. Negative slots are padding."""
    return sorted({slot // block_tokens for slot in slots.tolist() if slot >= 0})


def _read(metadata: Any, block_tokens: int) -> list[int]:
    """Blocks with a token of a request of this step."""
    requests = metadata.query_start_loc.shape[0] - 1
    lens, tables = metadata.seq_lens[:requests].tolist(), metadata.block_table[:requests].tolist()
    return sorted(
        {block for table, tokens in zip(tables, lens, strict=True) for block in table[: -(-tokens // block_tokens)]}
    )


def install(driver: Driver) -> None:
    """Every step tells from here on."""
    from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl

    update, forward = TritonAttentionImpl.do_kv_cache_update, TritonAttentionImpl.forward

    def do_kv_cache_update(  # noqa: PLR0917 - vLLM's signature
        self: Any, layer: Any, key: Any, value: Any, kv_cache: Any, slot_mapping: Any
    ) -> None:
        stream = Stream.current().cuda_stream
        driver.reach(stream)
        update(self, layer, key, value, kv_cache, slot_mapping)
        if blocks := _written(slot_mapping, kv_cache.shape[2]):
            driver.access(stream, _spans(kv_cache, blocks), writes=True)

    def forward_and_tell(  # noqa: PLR0917 - vLLM's signature
        self: Any,
        layer: Any,
        query: Any,
        key: Any,
        value: Any,
        kv_cache: Any,
        attn_metadata: Any,
        *rest: Any,
        **named: Any,
    ) -> Any:
        stream = Stream.current().cuda_stream
        driver.reach(stream)
        result = forward(self, layer, query, key, value, kv_cache, attn_metadata, *rest, **named)
        if attn_metadata is not None and (blocks := _read(attn_metadata, kv_cache.shape[2])):
            driver.access(stream, _spans(kv_cache, blocks), writes=False)
        return result

    TritonAttentionImpl.do_kv_cache_update = do_kv_cache_update
    TritonAttentionImpl.forward = forward_and_tell


def put_on_device(driver: Driver) -> None:
    """The KV cache counts as the device's memory, and the connector's worker takes it for a GPU's."""
    from kvcellar import worker

    register = worker.WorkerSide.register

    def adopt_and_register(self: Any, kv_caches: dict[str, torch.Tensor]) -> None:
        for storage in {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in kv_caches.values()
        }.values():
            driver.adopt(storage.data_ptr(), storage.nbytes())
        register(self, kv_caches)

    worker.WorkerSide.register = adopt_and_register  # type: ignore[method-assign]
    worker._gpu_of = lambda _kv_caches: 0
