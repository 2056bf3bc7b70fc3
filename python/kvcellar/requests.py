"""What the scheduler's side knows of each of vLLM's requests, and what a client may make of them.

Ids, salts, adapter names and ``kv_transfer_params`` are chosen by clients. Nothing here raises because of them: a
request whose values cannot be used is *left out*, which means that it is served as if KV Cellar did not exist.
"""

import json
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request

from kvcellar import ConfigError
from kvcellar._native import check_controls
from kvcellar.events import encode_extra_keys
from kvcellar.groups import Group, Groups
from kvcellar.offers import Blocks, GroupOffer

logger = init_logger(f"vllm.{__name__}")

_block_id = attrgetter("block_id")
CONTROLS_KEY = "kvcellar"
# More tokens than any request has.
NEVER = 1 << 62
# A longer id, or one with other characters, gets a name of ours: no id can be too long for the
# native engine.
_PLAIN_ID_CHARACTERS = 200
# So many requests that are left out are logged as warnings: clients must not be able to fill the
# log.
_WARNINGS_MAX = 10


class UnusableRequest(Exception):
    """A request that must be left out; says why.

    Attributes:
        usual: it is nobody's mistake and not worth a line in the log.
    """

    def __init__(self, why: str, *, usual: bool = False) -> None:
        super().__init__(why)
        self.usual = usual


class AskAgain(Exception):
    """What a request's KV belongs to is not known yet, but will be after the next step."""


class KnownRequest:
    """What has been told to the native engine of one request.

    Attributes:
        request: vLLM's own object.
        name: the native engine's id of it.
        hashes: block hashes the engine has.
        last_hash: the last of them, to notice a request that was rewritten.
        offered: per group, blocks offered since the last lookup.
        next_tokens: complete tokens at which there is something new to offer.
        local: tokens vLLM held itself at the last lookup.
        loaded: tokens we were asked to load since then.
        limit: tokens from which on nothing is offered, because another connector loaded them; None: no such tokens.
        scheduled: vLLM has scheduled the request since the last lookup.
        last_step: number of the last step that it was scheduled in; see `StepMetadata`.
        due: when a step has to look at it next, if it is far; see `due.Due`.
        forgets: it wants everything of its salt to be forgotten.
    """

    __slots__ = (
        "due",
        "forgets",
        "hashes",
        "last_hash",
        "last_step",
        "limit",
        "loaded",
        "local",
        "name",
        "next_tokens",
        "offered",
        "request",
        "scheduled",
    )

    def __init__(self, request: Request, name: str, groups: Groups) -> None:
        self.request = request
        self.name = name
        self.hashes = 0
        self.last_hash: bytes | None = None
        self.last_step = 0
        self.due = NEVER
        self.forgets = forgets(request)
        self.looked_up(0, groups)

    def looked_up(self, local: int, groups: Groups) -> None:
        """Start over: everything is offered again (what is held already is only touched)."""
        self.local = local
        self.loaded = 0
        self.limit: int | None = None
        self.scheduled = False
        self.offered = [0] * len(groups.groups)
        self.next_tokens = self.tokens_of_next_block(groups)

    def new_hashes(self) -> list[bytes]:
        """Block hashes the engine does not have yet."""
        hashes = self.request.block_hashes
        if len(hashes) == self.hashes:
            return []
        fresh = list(hashes[self.hashes :])
        self.hashes = len(hashes)
        self.last_hash = hashes[-1]
        return fresh

    def was_rewritten(self) -> bool:
        """Whether hashes told to the engine are no longer the request's (streaming input replaces them)."""
        hashes = self.request.block_hashes
        return self.hashes > 0 and (len(hashes) < self.hashes or hashes[self.hashes - 1] != self.last_hash)

    def not_offered(self, index: int, group: Group, table: Sequence[KVCacheBlock], ready: int) -> Blocks:
        """A group's blocks that are complete at ``ready`` tokens and were not offered yet."""
        first = self.offered[index]
        return first, list(map(_block_id, table[first : ready // group.block_tokens]))

    def take_group(self, index: int, groups: Groups, fresh: Blocks, ready: int) -> GroupOffer:
        """Take note that a group's blocks are offered up to ``ready`` tokens.

        Args:
            index: the group.
            groups: all groups.
            fresh: blocks that may be offered.
            ready: complete tokens.

        Raises:
            UnusableRequest: what went into the block hashes beside tokens cannot be written down.
        """
        tokens = groups.groups[index].block_tokens
        first, blocks = fresh
        blocks = blocks[: max(0, ready // tokens - first)]
        extra = _extra_keys(self.request, first * tokens, len(blocks), tokens)
        self.offered[index] = first + len(blocks)
        return first, blocks, extra

    def take_plain(
        self, groups: Groups, tables: Sequence[Sequence[KVCacheBlock]], ready: int
    ) -> tuple[int, list[GroupOffer]]:
        """`not_offered` and `take_group` of all groups at once, where none holds states and nobody else loads.

        Returns:
            The first token of what is offered, and the offer.

        Raises:
            UnusableRequest: as `take_group`.
        """
        start, next_tokens = ready, NEVER
        taken: list[GroupOffer] = []
        for index, group in enumerate(groups.groups):
            tokens, first = group.block_tokens, self.offered[index]
            blocks = list(map(_block_id, tables[index][first : ready // tokens]))
            taken.append((first, blocks, _extra_keys(self.request, first * tokens, len(blocks), tokens)))
            if blocks:
                start = min(start, first * tokens)
                first += len(blocks)
                self.offered[index] = first
            next_tokens = min(next_tokens, (first + 1) * tokens)
        self.next_tokens = next_tokens
        return start, taken

    def tokens_of_next_block(self, groups: Groups) -> int:
        """Complete tokens at which a table has a new block to offer. Groups that hold states are told of."""
        offered = zip(groups.groups, self.offered, strict=True)
        ends = [(blocks + 1) * group.block_tokens for group, blocks in offered if not group.holds_states]
        return min(ends, default=NEVER)


def _extra_keys(request: Request, first_token: int, blocks: int, block_tokens: int) -> list[bytes]:
    """See `encode_extra_keys`.

    Raises:
        UnusableRequest: what went into the block hashes beside tokens cannot be written down.
    """
    try:
        return encode_extra_keys(request, first_token, blocks, block_tokens)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise UnusableRequest(f"its hash keys cannot be written down: {type(error).__name__}") from error


def plain(request_id: str) -> bool:
    """Whether vLLM's id can serve as the native engine's: short printable ASCII without the mark of our own names."""
    return (
        len(request_id) <= _PLAIN_ID_CHARACTERS
        and request_id.isascii()
        and request_id.isprintable()
        and ("#" not in request_id)
    )


def controls(request: Request) -> str | None:
    """Read a request's own wishes, as JSON for the native engine; None for no wishes.

    Raises:
        UnusableRequest: there are wishes and one of them is not understood. It may have been a wish not to store.
    """
    params: Any = request.kv_transfer_params
    if params is None:
        return None
    if not isinstance(params, dict):
        raise UnusableRequest(f"kv_transfer_params is no object but {type(params).__name__}")
    wishes = params.get(CONTROLS_KEY)
    if wishes is None:
        return None
    try:
        text = json.dumps(wishes)
        check_controls(text)
    except ConfigError as error:
        raise UnusableRequest(f"kv_transfer_params.{CONTROLS_KEY}: {error}") from error
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise UnusableRequest(f"kv_transfer_params.{CONTROLS_KEY}: {type(error).__name__}") from error
    return text


def forgets(request: Request) -> bool:
    """Whether a request wants everything of its salt to be forgotten."""
    params: Any = request.kv_transfer_params
    wishes = params.get(CONTROLS_KEY) if isinstance(params, dict) else None
    return isinstance(wishes, dict) and wishes.get("forget") is True


def salt(request: Request) -> bytes:
    """A request's ``cache_salt``; empty for none."""
    return (request.cache_salt or "").encode("utf-8", "surrogatepass")


class LeftOut:
    """Counts requests that are served without KV Cellar, and logs the first ones."""

    def __init__(self) -> None:
        self._logged = 0
        self._fresh = 0

    def take(self) -> int:
        """How many there were since the last call."""
        fresh, self._fresh = self._fresh, 0
        return fresh

    def add(self, request: Request, why: UnusableRequest) -> None:
        """One more."""
        self._fresh += 1
        self._logged += not why.usual
        # An id may be long or hold anything: its representation is cut.
        log = logger.debug if why.usual or self._logged > _WARNINGS_MAX else logger.warning
        log(
            "KV Cellar: request %.80r is served without it (nothing stored, nothing loaded): %.300s",
            request.request_id,
            why,
        )
        if self._logged == _WARNINGS_MAX and not why.usual:
            logger.warning("KV Cellar: further requests served without it are counted, not logged")
