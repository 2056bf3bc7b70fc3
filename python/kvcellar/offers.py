"""What the connector offers the native engine of a request, as plain tuples that cross the border in one call."""

from typing import TypeAlias

# (number of the first block, vLLM's block ids from there on)
Blocks: TypeAlias = tuple[int, list[int]]

# (number of the first block, vLLM's block ids from there on, encoded extra hash keys of each block
# or nothing)
GroupOffer: TypeAlias = tuple[int, list[int], list[bytes]]

# (request id, block hashes the engine lacks, number of the first token, token ids, one element a
# group)
Offer: TypeAlias = tuple[str, list[bytes], int, list[int], list[GroupOffer]]
