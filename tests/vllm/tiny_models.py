"""Tiny random models with a fixed seed. They say nothing sensible, but their logprobs depend on every byte of KV."""

import json
import time
from pathlib import Path
from typing import Any

MODEL_SEED = 7
VOCABULARY = 512
# Wide enough that attention weighs tokens differently and a wrong block shows in the logprobs.
SPREAD = 0.2
# Longer than the second in which the system says when a process began.
SETTLE_S = 2.0


def _save(config: Any, causal_lm: Any, path: Path, *more: Any) -> Path:
    """Writes a model and what belongs to it."""
    import torch

    torch.manual_seed(MODEL_SEED)
    model = causal_lm(config).to(torch.bfloat16)
    model.save_pretrained(path, safe_serialization=True)
    for part in more:
        part.save_pretrained(path)
    # An engine that starts in the same moment cannot know whether it read these files or earlier
    # ones.
    time.sleep(SETTLE_S)
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


def llama(path: Path, kv_heads: int = 2) -> Path:
    """Four layers, four heads, two KV heads unless told: divisible by two ranks and by two pipeline stages."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=32,
        max_position_embeddings=2048,
        initializer_range=SPREAD,
        tie_word_embeddings=False,
    )
    return _save(config, LlamaForCausalLM, path)


_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": SPREAD,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def mamba2(path: Path) -> Path:
    """Granite 4's hybrid without experts: two layers of Mamba-2 and two of attention, in turn."""
    from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

    config = GraniteMoeHybridConfig(
        **_SMALL,
        num_hidden_layers=4,
        layer_types=["mamba", "attention"] * 2,
        num_local_experts=0,
        num_experts_per_tok=0,
        shared_intermediate_size=256,
        mamba_n_heads=8,
        mamba_n_groups=2,
        mamba_d_state=16,
        mamba_d_head=32,
        mamba_d_conv=4,
        mamba_expand=2,
        mamba_chunk_size=32,
        position_embedding_type="rope",
        attention_multiplier=32**-0.5,
        residual_multiplier=1.0,
    )
    return _save(config, GraniteMoeHybridForCausalLM, path)


def gated_delta_net(path: Path) -> Path:
    """Qwen3-Next with four small experts: two layers of gated delta net and two of gated attention, in turn."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    config = Qwen3NextConfig(
        **_SMALL,
        num_hidden_layers=4,
        head_dim=256,
        layer_types=["linear_attention", "full_attention"] * 2,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        linear_conv_kernel_dim=4,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        decoder_sparse_step=1,
    )
    return _save(config, Qwen3NextForCausalLM, path)


def short_convolution(path: Path) -> Path:
    """LFM2: two layers of short convolution and two of attention, in turn."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    config = Lfm2Config(
        **_SMALL,
        num_hidden_layers=4,
        layer_types=["conv", "full_attention"] * 2,
        conv_L_cache=3,
        block_auto_adjust_ff_dim=False,
        conv_dim=128,
        conv_dim_out=128,
        block_dim=128,
        block_ff_dim=256,
        block_multiple_of=1,
        block_ffn_dim_multiplier=1.0,
        block_norm_eps=1e-5,
    )
    return _save(config, Lfm2ForCausalLM, path)


CHUNK = 64


def chunked_local(path: Path) -> Path:
    """Llama 4 without experts: three layers of chunked local attention and a full one, four groups of a layer each."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(
        **_SMALL,
        num_hidden_layers=4,
        head_dim=32,
        intermediate_size_mlp=256,
        attention_chunk_size=CHUNK,
        num_local_experts=2,
        num_experts_per_tok=1,
        interleave_moe_layer_step=0,
        no_rope_layer_interval=4,
        layer_types=["chunked_attention"] * 3 + ["full_attention"],
        moe_layers=[],
    )
    return _save(config, Llama4ForCausalLM, path)


# Longest prompt for which a LongRoPE model that is started for no more uses its short factors.
SHORT_TOKENS = 256


def long_rope(path: Path) -> Path:
    """A Phi-3 whose rotary embeddings have one set of factors up to `SHORT_TOKENS` and quite another beyond."""
    from transformers import Phi3Config, Phi3ForCausalLM

    head_dim = 32
    config = Phi3Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4 * SHORT_TOKENS,
        original_max_position_embeddings=SHORT_TOKENS,
        initializer_range=SPREAD,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 1.0,
            "original_max_position_embeddings": SHORT_TOKENS,
            "short_factor": [1.0] * (head_dim // 2),
            "long_factor": [8.0 + dimension for dimension in range(head_dim // 2)],
        },
    )
    return _save(config, Phi3ForCausalLM, path)


def adapter(path: Path, model: Path, seed: int, *, rank: int = 8, spread: float = 0.5) -> Path:
    """A random LoRA adapter for the attention of a model with Llama's names; another seed is another adapter.

    Written into `path`, in the place of what lies there.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rows = {
        "q_proj": config.num_attention_heads * head_dim,
        "k_proj": config.num_key_value_heads * head_dim,
        "v_proj": config.num_key_value_heads * head_dim,
    }
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(config.num_hidden_layers):
        for name, width in rows.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, config.hidden_size, generator=random) * spread
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(width, rank, generator=random) * spread
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": "tiny",
        "bias": "none",
        "lora_alpha": rank,
        "r": rank,
        "target_modules": sorted(rows),
        "task_type": "CAUSAL_LM",
    }
    (path / "adapter_config.json").write_text(json.dumps(settings))
    return path


IMAGE_PIXELS = 64
# Each image takes so many tokens, at the beginning of the prompt.
IMAGE_TOKENS = 64
IMAGE_TOKEN = VOCABULARY - 1


def blip(path: Path) -> Path:
    """A BLIP-2 with its processor. Its text is token ids; its parts are those that run without torchvision."""
    from transformers import Blip2Config, Blip2QFormerConfig, Blip2VisionConfig, OPTConfig

    vision = Blip2VisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_PIXELS,
        patch_size=IMAGE_PIXELS // 4,
        initializer_range=SPREAD,
    )
    queries = Blip2QFormerConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        encoder_hidden_size=64,
        initializer_range=SPREAD,
    )
    text = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        word_embed_proj_dim=128,
        ffn_dim=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=2048,
        init_std=SPREAD,
    )
    config = Blip2Config(
        vision_config=vision,
        qformer_config=queries,
        text_config=text,
        num_query_tokens=IMAGE_TOKENS,
        image_token_index=IMAGE_TOKEN,
        initializer_range=SPREAD,
    )
    return _save(config, _blip_with_queries, path, _blip_processor())


def _blip_with_queries(config: Any) -> Any:
    """Queries are zeros in a new model, and all tokens of an image the same."""
    import torch
    from transformers import Blip2ForConditionalGeneration

    model = Blip2ForConditionalGeneration(config)
    torch.nn.init.normal_(model.query_tokens)
    return model


def _blip_processor() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import Blip2Processor, BlipImageProcessorPil, PreTrainedTokenizerFast

    words = {f"t{number}": number for number in range(IMAGE_TOKEN)} | {"<image>": IMAGE_TOKEN}
    bare = Tokenizer(WordLevel(words, unk_token="t0"))  # noqa: S106  (no password)
    bare.pre_tokenizer = WhitespaceSplit()
    names = {"unk_token": "t0", "eos_token": "t2", "pad_token": "t1"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, **names)
    images = BlipImageProcessorPil(size={"height": IMAGE_PIXELS, "width": IMAGE_PIXELS})
    return Blip2Processor(image_processor=images, tokenizer=tokenizer, num_query_tokens=IMAGE_TOKENS)
