"""What slots of one size cost for hybrid models: bytes per 1,000 tokens and the share that is wasted.

Computed, not measured: from public model configurations, in bfloat16 on one rank, with vLLM's rules for groups and
block sizes. A state counts once for each prompt: vLLM keeps the one at its end.
"""

from dataclasses import dataclass

PROMPT_TOKENS = 8192
# Of a slot, beside its payload: names and tokens, rounded up to pages of 4 KiB.
DESCRIPTOR_BYTES = 1024
PAGE = 4096


@dataclass(frozen=True)
class Group:
    """Groups of one kind.

    Attributes:
        count: how many groups there are.
        bytes: of one block's payload.
        kept: blocks that are stored of each prompt.
    """

    count: int
    bytes: int
    kept: float


@dataclass(frozen=True)
class Model:
    """A model.

    Attributes:
        name: for people, with its layers.
        block_tokens: tokens of a block, as vLLM chooses them.
        groups: its KV cache groups.
    """

    name: str
    block_tokens: int
    groups: tuple[Group, ...]


def attention(layers: int, token_bytes: int, block_tokens: int, count: int = 1, share: float = 1.0) -> Group:
    """Groups of attention layers. ``share``: of their blocks, how many some hit can need."""
    return Group(count, layers * token_bytes * block_tokens, PROMPT_TOKENS / block_tokens * share)


def states(layers: int, state_bytes: int, count: int) -> Group:
    """Groups of layers that hold states."""
    return Group(count, layers * state_bytes, 1)


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def models() -> list[Model]:
    """Models of each kind, the plain one first."""
    gdn = 32 * 128 * 128 * 4 + 3 * 8192 * 2
    gdn_block = _up(-(-gdn // 2048), 16)
    mamba = 128 * 64 * 128 * 4 + 3 * (128 * 64 + 2 * 128) * 2
    mamba_block = _up(-(-mamba // 4096), 16)
    return [
        Model("Llama 3.1 8B (plain)", 16, (attention(32, 4096, 16),)),
        Model("gpt-oss 120B: 18 full, 18 sliding windows", 16, (attention(18, 2048, 16, 2),)),
        Model(
            "Llama 4 Scout: 12 full, 36 chunked",
            16,
            (attention(12, 4096, 16), attention(12, 4096, 16, 3, share=1 - 16 / 8192)),
        ),
        Model(
            "Qwen3-Next 80B: 12 full, 36 gated delta net",
            gdn_block,
            (attention(12, 2048, gdn_block), states(12, gdn, 3)),
        ),
        Model(
            "Granite 4.0 H Small: 4 full, 36 Mamba-2",
            mamba_block,
            (attention(4, 4096, mamba_block), states(4, mamba, 9)),
        ),
        Model("LFM2 1.2B: 6 full, 10 short convolutions", 16, (attention(6, 2048, 16), states(6, 8192, 2))),
        Model("DeepSeek V3.2: MLA with indexer, one group", 64, (attention(61, 1152 + 132, 64),)),
    ]


def rows() -> list[tuple[str, ...]]:
    """For each model: name, tokens of a block, slot, megabytes per 1,000 tokens, share wasted."""
    found: list[tuple[str, ...]] = []
    for model in models():
        descriptor = _up(DESCRIPTOR_BYTES + 4 * model.block_tokens, PAGE)
        slot = descriptor + _up(max(group.bytes for group in model.groups), PAGE)
        slots = sum(group.count * group.kept for group in model.groups)
        used = sum(group.count * group.kept * group.bytes for group in model.groups)
        per_1000, wasted = slots * slot / PROMPT_TOKENS * 1000, 1 - used / (slots * slot)
        sizes = (f"{slot / 1e6:.2f} MB", f"{per_1000 / 1e6:.1f}", f"{wasted:.1%}")
        found.append((model.name, str(model.block_tokens), *sizes))
    return found
