"""vLLM's KV tensors as the native copy worker wants to know them: addresses, strides and lengths in bytes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch

from kvcellar import UnsupportedError

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig


# What vLLM hands out for one layer.
KVCaches: TypeAlias = torch.Tensor | Sequence[torch.Tensor]


@dataclass(frozen=True)
class LayerView:
    """One tensor of a layer's KV cache.

    Attributes:
        address: of block 0.
        stride_bytes: from one kernel block to the next.
        page_bytes: contiguous bytes of one kernel block.
        pages_per_block: kernel blocks of one block.
        pages: kernel blocks in the tensor.
    """

    address: int
    stride_bytes: int
    page_bytes: int
    pages_per_block: int
    pages: int


def _page_elements(name: str, tensor: torch.Tensor) -> int:
    """Elements of one kernel block, which must lie without gaps (in any order of dimensions)."""
    inner = sorted(zip(tensor.stride()[1:], tensor.shape[1:], strict=True))
    expected = 1
    for stride, size in inner:
        if size == 1:
            continue
        if stride != expected:
            raise UnsupportedError(
                f"The KV tensor of layer {name} has gaps inside a block (shape {tuple(tensor.shape)}, strides "
                f"{tensor.stride()}), which is not supported. Choose another KV cache layout, or serve without "
                f"KV Cellar"
            )
        expected *= size
    return expected


def tensors_of(layer: KVCaches) -> Sequence[torch.Tensor]:
    """The tensors of a layer: one of attention; of a layer that holds states, one for each of its states."""
    return (layer,) if isinstance(layer, torch.Tensor) else tuple(layer)


def layer_view(name: str, tensor: torch.Tensor, num_blocks: int) -> LayerView:
    """Describe one tensor of a layer.

    Args:
        name: the layer, for messages.
        tensor: vLLM's view, shape ``[kernel blocks, ...]``.
        num_blocks: vLLM's number of blocks.

    Raises:
        UnsupportedError: when the tensor does not hold a whole number of kernel blocks for every block.
    """
    pages = tensor.shape[0]
    if num_blocks <= 0 or pages % num_blocks:
        raise UnsupportedError(f"The KV tensor of layer {name} has {pages} kernel blocks for {num_blocks} blocks")
    size = tensor.element_size()
    return LayerView(
        address=tensor.data_ptr(),
        stride_bytes=tensor.stride(0) * size,
        page_bytes=_page_elements(name, tensor) * size,
        pages_per_block=pages // num_blocks,
        pages=pages,
    )


def group_views(kv_cache_config: "KVCacheConfig", kv_caches: Mapping[str, KVCaches]) -> list[list[LayerView]]:
    """Describe this rank's layers of every group, in the group's order."""
    return [
        [
            layer_view(name, tensor, kv_cache_config.num_blocks)
            for name in group.layer_names
            if name in kv_caches
            for tensor in tensors_of(kv_caches[name])
        ]
        for group in kv_cache_config.kv_cache_groups
    ]


def native(views: list[list[LayerView]]) -> str:
    """The views in the native worker's JSON."""
    return json.dumps([[asdict(view) for view in group] for group in views])
