"""Tiny models with KV cache groups of kinds beside full attention and sliding windows."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.vllm import cache_model, tiny_models


@dataclass(frozen=True)
class Kind:
    """A model.

    Attributes:
        make: writes it.
        specs: vLLM's specs of its groups.
        needs: what each of them needs of a prefix.
        slot_kib: about, in the data type below.
        few_blocks: of vLLM's own cache, too few for eight conversations at once: it has to preempt.
        noise: how far logprobs of a prompt computed among others may be from those of the same prompt computed alone,
            without any cache. None: no bound is known.
        dtype: in which vLLM's CPU kernels run it with the least noise.
    """

    make: Callable[[Path], Path]
    specs: tuple[str, ...]
    needs: tuple[cache_model.Need, ...]
    slot_kib: int
    few_blocks: int
    noise: float | None
    dtype: str = "float32"


STATE = (("MambaSpec", "FullAttentionSpec"), (cache_model.state_at_the_end, cache_model.whole_prefix))
CHUNKED = (
    ("ChunkedLocalAttentionSpec",) * 3 + ("FullAttentionSpec",),
    (*(cache_model.own_chunk(tiny_models.CHUNK),) * 3, cache_model.whole_prefix),
)
KINDS = {
    "mamba2": Kind(tiny_models.mamba2, *STATE, slot_kib=52, few_blocks=20, noise=1e-3),
    # Its kernel takes nothing but bfloat16.
    "gated_delta_net": Kind(
        tiny_models.gated_delta_net, *STATE, slot_kib=132, few_blocks=40, noise=0.25, dtype="bfloat16"
    ),
    # vLLM 0.32 alone is off by 0.9: its kernel computes a prompt among others differently.
    "short_convolution": Kind(tiny_models.short_convolution, *STATE, slot_kib=40, few_blocks=40, noise=None),
    "chunked_local": Kind(tiny_models.chunked_local, *CHUNKED, slot_kib=24, few_blocks=64, noise=1e-3),
}
