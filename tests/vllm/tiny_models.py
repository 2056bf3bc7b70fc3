"""Tiny random models with a fixed seed. They say nothing sensible, but their logprobs depend on every byte of KV."""

from pathlib import Path
from typing import Any

MODEL_SEED = 7
VOCABULARY = 512
# Wide enough that attention weighs tokens differently and a wrong block shows in the logprobs.
SPREAD = 0.2


def _save(config: Any, causal_lm: Any, path: Path) -> Path:
    import torch

    torch.manual_seed(MODEL_SEED)
    model = causal_lm(config).to(torch.bfloat16)
    model.save_pretrained(path, safe_serialization=True)
    return path


def hybrid(path: Path) -> Path:
    """Five sliding-window layers (window 64) and a full one: six KV cache groups of one layer each."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=64,
        layer_types=["sliding_attention"] * 5 + ["full_attention"],
        max_position_embeddings=2048,
        initializer_range=SPREAD,
    )
    return _save(config, Gemma3ForCausalLM, path)


def llama(path: Path) -> Path:
    """Four layers, four heads, two KV heads: divisible by two ranks and by two pipeline stages."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        initializer_range=SPREAD,
        tie_word_embeddings=False,
    )
    return _save(config, LlamaForCausalLM, path)
