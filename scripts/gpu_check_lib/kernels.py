"""vLLM's compiled kernels under this torch, beside plain torch in float32: seconds, before an engine is started.

They were built for another torch, through its stable interface. Every output is poisoned first, inputs are random.
"""

import json
from collections.abc import Iterator

import torch

# Of bfloat16 operands: rounding gives a third of it, a wrong kernel about 1.
ERROR_MAX = 2e-2


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def _layers() -> Iterator[tuple[str, float]]:
    import vllm._C_stable_libtorch  # noqa: F401

    x = torch.randn(64, 1024, device="cuda", dtype=torch.bfloat16)
    weight = torch.rand(1024, device="cuda", dtype=torch.bfloat16)
    out = torch.full_like(x, float("nan"))
    torch.ops._C.rms_norm(out, x, weight, 1e-5)
    exact = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5) * weight.float()
    yield "rms_norm", _error(out, exact)
    out = torch.full((64, 512), float("nan"), device="cuda", dtype=torch.bfloat16)
    torch.ops._C.silu_and_mul(out, x)
    gate, up = x.float().chunk(2, dim=-1)
    yield "silu_and_mul", _error(out, torch.nn.functional.silu(gate) * up)


def _attention() -> Iterator[tuple[str, float]]:
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    query, key, value = (torch.randn(128, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2))
    starts = torch.tensor([0, 128], device="cuda", dtype=torch.int32)
    found = flash_attn_varlen_func(
        query,
        key,
        value,
        max_seqlen_q=128,
        cu_seqlens_q=starts,
        max_seqlen_k=128,
        cu_seqlens_k=starts,
        causal=True,
        fa_version=3,
    )
    exact = torch.nn.functional.scaled_dot_product_attention(
        *(x.float().transpose(0, 1)[None] for x in (query, key.repeat_interleave(4, 1), value.repeat_interleave(4, 1))),
        is_causal=True,
    )
    yield "FlashAttention 3", _error(found, exact[0].transpose(0, 1))


def main() -> None:
    """A line of JSON for each kernel. One that cannot run does not keep the others from it."""
    torch.manual_seed(20817)
    for kernels in (_layers, _attention):
        try:
            for name, error in kernels():
                print(json.dumps({"name": name, "error": error, "ok": error < ERROR_MAX}), flush=True)
        except Exception as error:  # noqa: BLE001 - it is told, and the others run
            print(json.dumps({"name": kernels.__name__, "failed": repr(error)[:300], "ok": False}), flush=True)


if __name__ == "__main__":
    main()
