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
        slot_kib: of bfloat16, about.
        few_blocks: of vLLM's own cache, too few for eight conversations at once: it has to preempt.
    """

    make: Callable[[Path], Path]
    specs: tuple[str, ...]
    needs: tuple[cache_model.Need, ...]
    slot_kib: int
    few_blocks: int


STATE = (("MambaSpec", "FullAttentionSpec"), (cache_model.state_at_the_end, cache_model.whole_prefix))
CHUNKED = (
    ("ChunkedLocalAttentionSpec",) * 3 + ("FullAttentionSpec",),
    (*(cache_model.own_chunk(tiny_models.CHUNK),) * 3, cache_model.whole_prefix),
)
KINDS = {
    "mamba2": Kind(tiny_models.mamba2, *STATE, slot_kib=52, few_blocks=20),
    "gated_delta_net": Kind(tiny_models.gated_delta_net, *STATE, slot_kib=132, few_blocks=40),
    "short_convolution": Kind(tiny_models.short_convolution, *STATE, slot_kib=20, few_blocks=40),
    "chunked_local": Kind(tiny_models.chunked_local, *CHUNKED, slot_kib=12, few_blocks=64),
}
