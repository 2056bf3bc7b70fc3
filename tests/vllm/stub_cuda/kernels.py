"""In place of vLLM's compiled kernels (`vllm._C_stable_libtorch`), for a dense Llama: plain torch.

What modules ask while they are imported is answered with no.
"""

import sys
from types import ModuleType

import torch
from torch.nn import functional

_LIBRARY = torch.library.Library("_C", "FRAGMENT")
# The second is FlashAttention, which modules import and nobody calls with the Triton backend.
_MODULES = ("vllm._C_stable_libtorch", "vllm.vllm_flash_attn._vllm_fa3_C")
_QUESTIONS = (
    "cutlass_scaled_mm_supports_fp8",
    "cutlass_scaled_mm_supports_block_fp8",
    "cutlass_scaled_mm_supports_fp4",
    "cutlass_group_gemm_supported",
)


def _silu_and_mul(result: torch.Tensor, x: torch.Tensor) -> None:
    gate, up = x.chunk(2, dim=-1)
    result.copy_(functional.silu(gate) * up)


def _rotary_embedding(  # noqa: PLR0917 - vLLM's signature
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
    rope_dim_offset: int = 0,
    inverse: bool = False,
) -> None:
    assert is_neox and not rope_dim_offset and not inverse
    cos, sin = cos_sin_cache[positions.flatten()].float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    for tensor in (query, key):
        if tensor is None:
            continue
        heads = tensor.view(positions.numel(), -1, head_size)[..., : 2 * cos.shape[-1]]
        first, second = heads.float().chunk(2, dim=-1)
        heads.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1))


def install() -> None:
    """The module is there for whoever imports it."""
    for name in _QUESTIONS:
        _LIBRARY.define(f"{name}(int capability) -> bool")
        _LIBRARY.impl(name, lambda capability: False, "CompositeExplicitAutograd")
    _LIBRARY.define("silu_and_mul(Tensor(a!) result, Tensor input) -> ()")
    _LIBRARY.impl("silu_and_mul", _silu_and_mul, "CompositeExplicitAutograd")
    _LIBRARY.define(
        "rotary_embedding(Tensor positions, Tensor(a!) query, Tensor(b!)? key, int head_size, Tensor cos_sin_cache, "
        "bool is_neox, int rope_dim_offset=0, bool inverse=False) -> ()"
    )
    _LIBRARY.impl("rotary_embedding", _rotary_embedding, "CompositeExplicitAutograd")
    for name in _MODULES:
        sys.modules[name] = ModuleType(name)
