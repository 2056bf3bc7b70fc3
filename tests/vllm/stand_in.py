"""A connector beside ours that loads as a test tells it: late, never, in halves, wrong, before or beside a step.

What it shall do with a request stands in that request's `kv_transfer_params`; what it did, and when it shall go on,
on a `Desk`, which both of its sides and the test share: the engine is one process.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorTransferResults,
    SupportsHMA,
)

KEY = "stand_in"
# What no computed KV is: a block that holds it was never loaded rightly.
FOREIGN = 3.0


@dataclass(frozen=True)
class Wish:
    """What to do with a request.

    Attributes:
        name: the test's own name for the load.
        tokens: how many tokens the connector claims to have.
        beside: loads beside steps (asynchronously) instead of within one.
        bytes: what it writes into the blocks: foreign ones, what it kept under `kept`, or nothing.
        fails: whether it says in the end that the load failed.
        kept: the name under which an earlier request's blocks were kept.
        keeps: a name under which to keep this request's blocks when it finishes.
    """

    name: str
    tokens: int = 0
    beside: bool = True
    bytes: Literal["foreign", "kept", "none"] = "foreign"
    fails: bool = False
    kept: str = ""
    keeps: str = ""

    def params(self) -> dict[str, Any]:
        """As a part of `kv_transfer_params`."""
        return {KEY: vars(self)}


@dataclass
class Load:
    """A load under way. `first` is the index of its first block in the request."""

    wish: Wish
    request_id: str
    first: int
    blocks: list[int]
    written: bool = False
    told: bool = False


@dataclass
class Desk:
    """What both sides and the test know."""

    loads: dict[str, Load] = field(default_factory=dict)
    kept: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    caches: list[torch.Tensor] = field(default_factory=list)
    # Loads that may end, by name.
    released: set[str] = field(default_factory=set)
    # Called when vLLM gave a load its blocks, before the step in which it is written.
    on_blocks: Callable[[Load], None] = lambda load: None
    bad_blocks: set[int] = field(default_factory=set)
    # Ranks whose payload the scheduler's side was given.
    shaken: list[tuple[int, int]] = field(default_factory=list)

    def write(self, load: Load) -> None:
        """Puts the load's bytes into its blocks."""
        load.written = True
        if load.wish.bytes == "none" or not load.blocks:
            return
        for index, cache in enumerate(self.caches):
            if load.wish.bytes == "kept":
                cache[load.blocks] = self.kept[load.wish.kept][index][load.first : load.first + len(load.blocks)]
            else:
                cache[load.blocks] = FOREIGN

    def keep(self, name: str, blocks: list[int]) -> None:
        """Copies blocks out of vLLM's KV cache."""
        self.kept[name] = [cache[blocks].clone() for cache in self.caches]


desk = Desk()


@dataclass
class Payload(KVConnectorHandshakeMetadata):
    """What each rank tells every scheduler's side, and through it other engines."""

    address: str


@dataclass
class LoadsOfStep(KVConnectorMetadata):
    """Names of loads that got their blocks in this step."""

    names: list[str]


def wish_of(request: Any) -> Wish | None:
    """What the test wants of this request."""
    wish = (request.kv_transfer_params or {}).get(KEY)
    return Wish(**wish) if wish else None


class StandInConnector(KVConnectorBase_V1, SupportsHMA):
    """Both sides. With `"handshake": true` it exchanges payloads as NIXL does, and takes nobody else's for its own."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        """Nothing is loaded yet."""
        super().__init__(vllm_config, role, kv_cache_config)
        self._block_tokens = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        self._local: dict[str, int] = {}
        self._new: list[str] = []

    # -- worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Keeps vLLM's tensors, the first dimension of which is the block."""
        assert all(cache.shape[0] == self._kv_cache_config.num_blocks for cache in kv_caches.values())
        desk.caches = list(kv_caches.values())

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Writes what has its blocks now: all of it, or for a load that ends later only what it has so far."""
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, LoadsOfStep)
        for name in metadata.names:
            load = desk.loads[name]
            desk.write(load)
            if not load.wish.beside and load.wish.fails:
                desk.bad_blocks |= set(load.blocks)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing to do for each layer."""

    def wait_for_save(self) -> None:
        """Nothing to wait for."""

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Loads beside steps that the test let end."""
        results = KVConnectorTransferResults()
        for name in sorted(desk.released & set(desk.loads)):
            load = desk.loads[name]
            if load.wish.beside and load.written and not load.told:
                load.told = True
                results.finished_recving.add(load.request_id)
                if load.wish.fails:
                    results.failed_recving.add(load.request_id)
        return results

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks of failed loads within a step."""
        bad, desk.bad_blocks = desk.bad_blocks, set()
        return bad

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """This rank's payload."""
        return Payload("here") if self._shakes_hands() else None

    def _shakes_hands(self) -> bool:
        return bool(self._kv_transfer_config.get_from_extra_config("handshake", default=False))

    # -- scheduler

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        """All ranks' payloads.

        Raises:
            TypeError: one of them is somebody else's.

        """
        if not self._shakes_hands():
            return
        for rank, payload in metadata.items():
            if not isinstance(payload, Payload):
                raise TypeError(f"rank {rank} told {type(payload).__name__} instead of its payload")
            desk.shaken.append(rank)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """What the request wishes, once."""
        wish = wish_of(request)
        if wish is None or wish.name in desk.loads or wish.tokens <= num_computed_tokens:
            return 0, False
        self._local[request.request_id] = num_computed_tokens
        return wish.tokens - num_computed_tokens, wish.beside

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """The load has its blocks."""
        wish = wish_of(request)
        if wish is None or num_external_tokens == 0:
            return
        first = self._local.pop(request.request_id) // self._block_tokens
        (table,) = blocks.get_block_ids()
        blocks_wanted = list(table[first : -(-wish.tokens // self._block_tokens)])
        load = Load(wish, request.request_id, first, blocks_wanted)
        desk.loads[wish.name] = load
        self._new.append(wish.name)
        desk.on_blocks(load)

    def build_connector_meta(self, scheduler_output: Any) -> LoadsOfStep:
        """Loads that begin with this step."""
        new, self._new = self._new, []
        return LoadsOfStep(new)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Keeps the request's blocks where the test wants that."""
        wish = wish_of(request)
        if wish is not None and wish.keeps:
            desk.keep(wish.keeps, list(block_ids)[: request.num_computed_tokens // self._block_tokens])
        return False, None

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """The same, for models with one group."""
        (blocks,) = block_ids
        return self.request_finished(request, blocks)

    def has_pending_push_work(self) -> bool:
        """Whether a load that ended still has to be told."""
        return any(name in desk.loads and not desk.loads[name].told for name in desk.released)
