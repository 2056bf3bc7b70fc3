"""One engine that is started and asked: everything that two cells may differ in, as JSON on a child's command line."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Any

GIB = 1 << 30
BLOCK_TOKENS = 16


class Phase(StrEnum):
    """Who keeps the KV cache.

    Attributes:
        PLAIN: vLLM alone.
        NATIVE: vLLM's own OffloadingConnector, with as much host memory as ours.
        OURS: KV Cellar in host memory.
        FILL: KV Cellar with a disk tier, which is left full for NVME.
        NVME: a new engine over the disk tier that FILL left.
    """

    PLAIN = "plain"
    NATIVE = "native"
    OURS = "ours"
    FILL = "fill"
    NVME = "nvme"


class Scenario(StrEnum):
    """What a cell is asked.

    Attributes:
        CORRECT: whether hits of ours answer as vLLM's own do.
        SPEED: times to first token, and tokens a second where nothing is reused.
        SOAK: CORRECT with random prompts in too little memory, until the time is over.
    """

    CORRECT = "correct"
    SPEED = "speed"
    SOAK = "soak"


@dataclass(frozen=True)
class Shape:
    """A Llama with random weights. KV of a token: 4 * layers * kv_heads * head_dim bytes."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @property
    def token_bytes(self) -> int:
        """KV of one token, in bfloat16."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim

    def as_config(self) -> dict[str, Any]:
        """A model's config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 32768,
            "rope_theta": 500000.0,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "bfloat16",
        }


SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "tiny": Shape(128, 256, 2, 2, 1, 64, 256),
        "smol": Shape(576, 1536, 30, 9, 3, 64, 49152),
        "8b": Shape(4096, 14336, 32, 32, 8, 128, 128256),
    }
)


@dataclass(frozen=True)
class Cell:
    """One engine and what it is asked.

    Attributes:
        name: for the table.
        scenario: what it is asked.
        phase: who keeps the KV cache.
        shape: of the model, from `SHAPES`.
        backend: of attention.
        runner: vLLM's model runner, 1 or 2.
        layout: of the KV cache; empty: what backend and connector agree on.
        lengths: tokens of the prompts.
        runs: prompts of each length.
        answer_tokens: of an answer that is compared.
        load_prompts: of the part without reuse; none: it is left out.
        crowd: prompts at a time that take blocks from others.
        kv_bytes: vLLM's own KV cache; too small for a crowd, so that blocks are given to others while
            they are copied.
        dram_bytes: of the tier in host memory, ours or vLLM's.
        batched_tokens: of a step, at most.
        eager: without CUDA graphs.
        compiled: with torch.compile.
        seconds: how long a soak goes on.
        one_process: EngineCore runs in the process that asks.
        store: a folder for FILL and NVME; what is on disk lies in its folder `tier`.
        pool_dir: where our pool lies. Engines that run beside each other each need their own: all below one
            get `dram_bytes` together.
    """

    name: str
    scenario: Scenario
    phase: Phase = Phase.OURS
    shape: str = "tiny"
    backend: str = "FLASH_ATTN"
    runner: int = 2
    layout: str = ""
    lengths: tuple[int, ...] = (96, 500)
    runs: int = 2
    answer_tokens: int = 8
    load_prompts: int = 0
    crowd: int = 8
    kv_bytes: int = 1 << 20
    dram_bytes: int = GIB
    batched_tokens: int = 2048
    eager: bool = True
    compiled: bool = False
    seconds: float = 0.0
    one_process: bool = False
    store: str = ""
    pool_dir: str = "/dev/shm"

    def with_(self, **changes: Any) -> "Cell":
        """The same but for these."""
        return replace(self, **changes)

    def as_json(self) -> str:
        """For a child's command line."""
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, text: str) -> "Cell":
        """Read it there."""
        told = json.loads(text)
        told["scenario"], told["phase"] = Scenario(told["scenario"]), Phase(told["phase"])
        told["lengths"] = tuple(told["lengths"])
        return cls(**told)

    def connector(self) -> dict[str, Any] | None:
        """vLLM's kv_transfer_config; none: without one."""
        if self.phase is Phase.PLAIN:
            return None
        if self.phase is Phase.NATIVE:
            extra: dict[str, Any] = {"cpu_bytes_to_use": self.dram_bytes}
            return {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
        extra = {"dram_size": f"{self.dram_bytes >> 20}MiB", "keep_pool": False, "pool_dir": self.pool_dir}
        if self.phase in {Phase.FILL, Phase.NVME}:
            extra |= {"nvme_dir": f"{self.store}/tier", "nvme_size": "32GiB", "write_through": True}
        return {"kv_connector": "KVCellarConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}

    def environment(self) -> dict[str, str]:
        """What has to be set before vLLM is imported."""
        found = {
            "VLLM_USE_V2_MODEL_RUNNER": str(self.runner - 1),
            "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(not self.one_process)),
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
            # Sampling by a package that is not there.
            "VLLM_USE_FLASHINFER_SAMPLER": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        if self.layout:
            found["VLLM_KV_CACHE_LAYOUT"] = self.layout
        if not self.compiled:
            found["TORCH_COMPILE_DISABLE"] = "1"
        return found
