"""How large vLLM's KV cache must be so that the conversations' working set is a given multiple of it."""

import json
from dataclasses import dataclass
from pathlib import Path

from quickstart_lib.arguments import Arguments
from quickstart_lib.conversations import Writer
from quickstart_lib.failure import QuickstartError

BLOCK_TOKENS = 32
NULL_BLOCKS = 1


@dataclass(frozen=True)
class CacheSize:
    """The server's cache, the data type that its bytes follow from, and the load it faces."""

    working_set_tokens: int
    block_bytes: int
    gpu_blocks: int
    model_len_tokens: int
    dtype: str

    @property
    def gpu_bytes(self) -> int:
        """Value of `--kv-cache-memory-bytes`: the CPU worker takes it as it is, to the byte."""
        return self.gpu_blocks * self.block_bytes


def kv_bytes_per_token(model: Path, element_bytes: int) -> int:
    """Bytes of K and V of one token over all layers."""
    config = json.loads((model / "config.json").read_text())
    values = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    return int(values * element_bytes)


def plan(arguments: Arguments, model: Path, writer: Writer) -> CacheSize:
    """Size the cache from the prompts that will really be sent.

    Raises:
        QuickstartError: a single request would not fit such a cache.
    """
    final_lengths = []
    for index in range(arguments.conversations):
        label = conversation_label(index)
        follow_ups = sum(len(writer.follow_up(label, turn)) for turn in range(1, arguments.turns))
        final_lengths.append(arguments.opening_tokens + follow_ups + arguments.turns * arguments.output_tokens)
    probe_len = arguments.probe_tokens + probe_extra_tokens(arguments.probes) + arguments.output_tokens
    model_len = -(-max(*final_lengths, probe_len) // BLOCK_TOKENS) * BLOCK_TOKENS
    working_set = sum(final_lengths)
    gpu_blocks = int(working_set / arguments.working_set_ratio) // BLOCK_TOKENS + NULL_BLOCKS
    if (gpu_blocks - NULL_BLOCKS) * BLOCK_TOKENS < model_len:
        raise QuickstartError(
            f"a KV cache of 1/{arguments.working_set_ratio:g} of {working_set} tokens does not hold one request of "
            f"{model_len} tokens: raise --conversations or lower --probe-tokens"
        )
    block_bytes = BLOCK_TOKENS * kv_bytes_per_token(model, arguments.data_type.element_bytes)
    return CacheSize(working_set, block_bytes, gpu_blocks, model_len, arguments.data_type.name)


def conversation_label(index: int) -> str:
    """Name of a conversation, written into its first words."""
    return f"C{index}"


def probe_extra_tokens(index: int) -> int:
    """Probes differ by a few tokens in length, so that hits end at different places within a block."""
    return 7 * index
