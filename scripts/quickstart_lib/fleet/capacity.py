"""How large the engines' caches are, so that one engine cannot hold all conversations."""

import math
from pathlib import Path

from tokenizers import Tokenizer

from quickstart_lib.cache_size import BLOCK_TOKENS, NULL_BLOCKS, CacheSize, kv_bytes_per_token
from quickstart_lib.failure import QuickstartError
from quickstart_lib.fleet.arguments import FleetArguments
from quickstart_lib.fleet.talks import Talk

# What the chat template writes around a message: its marks, its role and line ends. An answer may
# also become a few tokens more or fewer when its text is tokenized again.
MESSAGE_TOKENS = 8


def plan(arguments: FleetArguments, model: Path, talks: list[Talk]) -> CacheSize:
    """Size one engine's KV cache from the texts that will be sent.

    Raises:
        QuickstartError: such a cache would not hold the requests that may be in flight.
    """
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))

    def tokens(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids) + MESSAGE_TOKENS

    answers = arguments.turns * (arguments.output_tokens + MESSAGE_TOKENS)
    systems = {text: tokens(text) for text in {talk.system for talk in talks}}
    own = [sum(map(tokens, talk.questions)) + answers for talk in talks]
    longest = max(systems[talk.system] + length for talk, length in zip(talks, own, strict=True))
    model_len = math.ceil(longest / BLOCK_TOKENS) * BLOCK_TOKENS
    working_set = sum(systems.values()) + sum(own)
    blocks = int(working_set * arguments.kv_cache_share) // BLOCK_TOKENS
    if blocks * BLOCK_TOKENS < arguments.concurrency * model_len:
        raise QuickstartError(
            f"a KV cache of {blocks * BLOCK_TOKENS} tokens does not hold {arguments.concurrency} requests of "
            f"{model_len} tokens: raise --conversations or --kv-cache-share"
        )
    block_bytes = BLOCK_TOKENS * kv_bytes_per_token(model, arguments.data_type.element_bytes)
    return CacheSize(working_set, block_bytes, blocks + NULL_BLOCKS, model_len, arguments.data_type.name)


def dram_bytes(arguments: FleetArguments, size: CacheSize) -> int:
    """Size of one engine's dram tier."""
    return int(size.working_set_tokens * arguments.dram_share) // BLOCK_TOKENS * size.block_bytes
