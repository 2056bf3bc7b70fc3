"""The connector's part in EngineCore: translates vLLM's scheduler into calls of the native tier engine.

One native call a request or a step; nothing is decided here and no loop runs over blocks.
"""

import json
import multiprocessing
import time
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.kv_events import KVCacheEvent
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata
from vllm.logger import init_logger
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

from kvcellar import ConfigError, KvcellarError, UnsupportedError, facts
from kvcellar._native import Config, DiskReport, TierEngine, Watch, check_controls
from kvcellar.events import EventMaker, encode_extra_keys
from kvcellar.groups import Groups
from kvcellar.metadata import RankOffer, StepMetadata, WorkerTrouble
from kvcellar.offers import GroupOffer, Offer
from kvcellar.stats import KVCellarStats, of_engine

logger = init_logger(f"vllm.{__name__}")

CONTROLS_KEY = "kvcellar"
_GIB = 1 << 30
_block_id = attrgetter("block_id")
_NOTHING = StepMetadata(b"")
# Steps below that are decode, and say nothing about prefill.
_PREFILL_TOKENS_MIN = 128


class KnownRequest:
    """What has been told to the native engine of one request.

    Attributes:
        request: vLLM's own object.
        hashes: block hashes the engine has.
        last_hash: the last of them, to notice a request that was rewritten.
        offered: per group, blocks offered since the last lookup.
        next_tokens: complete tokens at which there is something new to offer.
        local: tokens vLLM held itself at the last lookup.
    """

    __slots__ = ("hashes", "last_hash", "local", "next_tokens", "offered", "request")

    def __init__(self, request: Request, groups: Groups) -> None:
        self.request = request
        self.hashes = 0
        self.last_hash: bytes | None = None
        self.local = 0
        self.rewind(groups)

    def rewind(self, groups: Groups) -> None:
        """The request starts over: offer everything again (what is held already is only touched)."""
        self.offered = [0] * len(groups.groups)
        self.next_tokens = min(group.block_tokens for group in groups.groups)

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


class SchedulerSide:
    """Scheduler role of the connector."""

    def __init__(self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, config: Config, groups: Groups) -> None:
        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._groups = groups
        events = vllm_config.kv_events_config
        publishes = bool(events and events.enable_kv_cache_events)
        # Data-parallel engines on this machine share the configured size.
        shares = max(1, vllm_config.parallel_config.data_parallel_size_local)
        self._config = config.narrowed(publishes, shares)
        self._engine = TierEngine(self._config, groups.native())
        self._events = EventMaker(groups)
        self._publishes = self._config.events
        self._manager: KVCacheManager | None = None
        self._requests: dict[str, KnownRequest] = {}
        self._opened = False
        # The engine has something under way, or may have counted something: most decode steps need not ask it.
        self._active = True
        self._counted = True
        self._measures_prefill = self._config.measures_prefill
        self._step_tokens = 0
        self._step_began = 0.0
        self._ticket: str | None = None
        self._attaching = 0
        self._watch: Watch | None = None
        parent = multiprocessing.parent_process()
        self._front_end = parent.pid if parent is not None else None

    # -- start and end -------------------------------------------------------------------------------------------------

    def bind(self, manager: KVCacheManager) -> None:
        """vLLM's own block tables, to be read anew in every step."""
        self._manager = manager

    def open(self, offers: Mapping[tuple[int, int], KVConnectorHandshakeMetadata]) -> None:
        """Create or adopt the pool now that every rank has told its part of a block.

        Raises:
            UnsupportedError: ranks on several machines, or ranks missing.
            KvcellarError: the pool cannot be had; the message names the setting and the remedy.
        """
        if self._opened:
            # vLLM 0.33 repeats the handshake after a sleep; the pool and its workers are as they were.
            return
        ranks = [offers[key] for key in sorted(offers)]
        parallel = self._vllm_config.parallel_config
        world = parallel.pipeline_parallel_size * parallel.tensor_parallel_size
        own = [rank for rank in ranks if isinstance(rank, RankOffer)]
        if len(own) != world:
            raise UnsupportedError(
                f"{len(own)} of {world} ranks told their KV cache layout. Use one machine, and the same "
                f"connector on all ranks"
            )
        machines = {rank.machine for rank in own}
        if len(machines) != 1 or machines != {facts.machine()}:
            raise UnsupportedError(
                f"The ranks of this engine run on {len(machines)} machines, and a host pool cannot span "
                f"machines. Run tensor "
                "and pipeline parallel ranks on one machine, or serve without KV Cellar"
            )
        stable = facts.hashes_are_stable(self._vllm_config)
        if not stable:
            logger.warning(
                "KV Cellar: block hashes change with every start (%s without PYTHONHASHSEED), so nothing "
                "survives a restart. "
                "Set PYTHONHASHSEED, or use sha256.",
                self._vllm_config.cache_config.prefix_caching_hash_algo,
            )
        replicas = self._kv_cache_config.kv_tp_replicas
        tensor = parallel.tensor_parallel_size
        native_ranks = []
        for index, rank in enumerate(own):
            first = index - index % tensor + (index % tensor) // replicas * replicas
            native_ranks.append({"block_bytes": rank.block_bytes, "replica_of": None if first == index else first})
        report = self._engine.open_pool(
            json.dumps(native_ranks),
            facts.collect(self._vllm_config, own),
            stable,
            PopulateProgress(),
            sorted({rank.near_node for rank in own if rank.near_node is not None}),
        )
        self._opened = True
        self._ticket = self._engine.ticket()
        logger.info(
            "KV Cellar: dram tier of %.2f GiB (%d blocks, bounded by %s) at %s; %d blocks adopted%s",
            report.bytes / _GIB,
            report.slots,
            report.bound,
            report.path,
            report.adopted_blocks,
            f"; in use by others: {', '.join(report.taken)}" if report.taken else "",
        )
        if report.disk is not None:
            _log_disk(report.disk)
        if self._front_end is not None:
            self._watch = _watch(self._engine, self._front_end)

    def shutdown(self) -> None:
        """Let go of the pool; its contents stay for the next start unless ``keep_pool`` is false."""
        self._watch = None
        self._engine.close()

    # -- one request's way ---------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """A request arrived, or was rewritten."""
        lora = request.lora_request.name if request.lora_request is not None else ""
        self._engine.add_request(request.request_id, _controls(request), lora)
        self._requests[request.request_id] = KnownRequest(request, self._groups)

    def lookup(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """vLLM's question: how many tokens beyond its own can be loaded?"""
        known = self._requests.get(request.request_id)
        if known is None or known.request is not request or known.was_rewritten():
            self.add(request)
            known = self._requests[request.request_id]
        self._active = self._counted = True
        known.local = num_computed_tokens
        known.rewind(self._groups)
        hit = self._engine.lookup(request.request_id, request.num_tokens, num_computed_tokens, known.new_hashes())
        return hit, bool(hit)

    def allocated(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """vLLM admitted the request; what it wants from us has its blocks now."""
        self._active = self._counted = True
        tables: list[list[int]] = []
        known = self._requests.get(request.request_id)
        if known is not None and num_external_tokens > 0:
            end = known.local + num_external_tokens
            for group, table in zip(self._groups.groups, blocks.blocks, strict=True):
                first = known.local // group.block_tokens
                tables.append(list(map(_block_id, table[first : -(-end // group.block_tokens)])))
        self._engine.admit(request.request_id, num_external_tokens, tables)

    def disk_tokens(self, request: Request) -> int:
        """Tokens of the request's last admission that come from disk."""
        return self._engine.disk_tokens(request.request_id)

    def finish(self, request: Request) -> None:
        """vLLM finished or aborted the request and is about to free its blocks: they may still be copied, behind
        fences.
        """
        known = self._requests.pop(request.request_id, None)
        if known is None:
            return
        self._active = self._counted = True
        offer = None
        if not known.was_rewritten():
            offer = self._offer(known, request.num_computed_tokens)
        self._engine.finish(request.request_id, request.num_prompt_tokens, request.num_tokens, offer)

    # -- one step's way ------------------------------------------------------------------------------------------------

    def step(self, output: SchedulerOutput) -> StepMetadata:
        """Plan the copies of a step that vLLM has just scheduled."""
        if self._measures_prefill:
            self._time_step(output.total_num_scheduled_tokens)
        offers = []
        for request_id, scheduled in output.num_scheduled_tokens.items():
            known = self._requests.get(request_id)
            if known is None:
                continue
            ready = known.request.num_computed_tokens + scheduled
            # Most decode steps complete no block: nothing else is looked at then.
            if ready >= known.next_tokens and (offer := self._offer(known, ready)) is not None:
                offers.append(offer)
        if not offers and not self._active:
            return _NOTHING
        self._counted = True
        plan, quiet = self._engine.step(offers, handed_out(output, self._groups))
        self._active = not quiet
        ticket, self._ticket = self._ticket, None
        if ticket is not None:
            self._attaching = self._vllm_config.max_concurrent_batches + 1
        return StepMetadata(plan, ticket, self._front_end if ticket is not None else None)

    def _time_step(self, tokens: int) -> None:
        """Tell the engine how long the last step's prefill took: until this one, if vLLM did not idle in between.

        An idle gap makes prefill look slower than it is, so that more is loaded: the safe side.
        """
        now = time.perf_counter()
        if self._step_tokens >= _PREFILL_TOKENS_MIN:
            self._engine.prefilled(self._step_tokens, now - self._step_began)
        self._step_tokens, self._step_began = tokens, now

    def _offer(self, known: KnownRequest, ready: int) -> Offer | None:
        """Blocks that are complete once ``ready`` tokens are, as far as tokens and hashes are known."""
        request = known.request
        # Placeholders of async scheduling and rejected speculative tokens have no hash yet.
        ready = min(ready, request.num_tokens, len(request.block_hashes) * self._groups.hash_tokens)
        if ready < known.next_tokens or self._manager is None:
            return None
        tables = self._manager.get_blocks(request.request_id).blocks
        groups: list[GroupOffer] = []
        start = ready
        for index, group in enumerate(self._groups.groups):
            first, last = known.offered[index], ready // group.block_tokens
            blocks = list(map(_block_id, tables[index][first:last]))
            extra = encode_extra_keys(request, first * group.block_tokens, len(blocks), group.block_tokens)
            groups.append((first, blocks, extra))
            start = min(start, first * group.block_tokens)
            known.offered[index] = first + len(blocks)
        known.next_tokens = min(
            (offered + 1) * group.block_tokens
            for offered, group in zip(known.offered, self._groups.groups, strict=True)
        )
        tokens = request.all_token_ids[start:ready]
        return (request.request_id, known.new_hashes(), start, list(tokens), groups)

    def output(self, output: KVConnectorOutput) -> None:
        """What the workers reported after a step."""
        trouble = output.kv_connector_worker_meta
        if trouble is not None and isinstance(trouble, WorkerTrouble):
            logger.error("KV Cellar: a worker cannot use the host pool, the dram tier is off: %s", trouble.problem)
            self._engine.close()
        elif self._attaching:
            # Outputs of steps that were under way when the ticket was sent come first; after them every worker is
            # attached.
            self._attaching -= 1
            if self._attaching == 0:
                self._engine.attached()
        if output.finished_recving:
            self._active = self._counted = True
            self._engine.loads_ended(list(output.finished_recving), list(output.failed_recving or ()))

    def has_pending_work(self) -> bool:
        """Whether vLLM should keep stepping although no request runs."""
        return self._active and self._engine.pending_work()

    def take_events(self) -> Iterable[KVCacheEvent]:
        """Events of our tiers since the last step."""
        if not self._publishes:
            return ()
        return [self._events.make(run) for run in self._engine.take_events(self._events.integer_hashes)]

    def take_stats(self) -> KVCellarStats | None:
        """What changed since the last step."""
        if not self._counted:
            return None
        # Once more after the last step that had something under way.
        self._counted = self._active
        stats = self._engine.take_stats()
        return None if stats is None else of_engine(stats)

    def reset(self) -> None:
        """Everything stored so far is worthless: weights changed."""
        self._active = self._counted = True
        self._engine.reset()


def _log_disk(disk: DiskReport) -> None:
    logger.info(
        "KV Cellar: nvme tier of at most %d blocks at %s (%s%s%s); %d blocks survived (%s)%s%s",
        disk.extents_max,
        disk.path,
        disk.engine,
        ", O_DIRECT" if disk.direct else ", buffered",
        ", registered" if disk.registered else "",
        disk.blocks,
        disk.recovery,
        f"; in use by others: {', '.join(disk.taken)}" if disk.taken else "",
        f"; {disk.why}" if disk.why else "",
    )
    if disk.damaged:
        logger.warning("KV Cellar: %d extents on disk were damaged and are dropped", disk.damaged)
    if disk.engine_why:
        logger.warning("KV Cellar: the disk is used with %s: %s", disk.engine, disk.engine_why)


def handed_out(output: SchedulerOutput, groups: Groups) -> list[list[int]]:
    """Blocks that vLLM lets requests write from this step on: whoever still reads one of them has to be waited for.

    A request's table begins with what is computed already: found in vLLM's own cache, or loaded. Requests only read
    that, beside whoever copies it.
    """
    lists: list[list[int]] = []

    def hand_out(tables: Sequence[Sequence[int]], computed_tokens: int) -> None:
        for group, table in zip(groups.groups, tables, strict=True):
            lists.append(list(table[computed_tokens // group.block_tokens :]))

    for request in output.scheduled_new_reqs:
        # A replay writes sliding windows below what is computed.
        replays = getattr(request, "replay_start", 0) > 0
        hand_out(request.block_ids, 0 if replays else request.num_computed_tokens)
    cached = output.scheduled_cached_reqs
    for request_id, tables, computed_tokens in zip(
        cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
    ):
        if tables is not None:
            # A resumed request gets its whole table anew, any other one what is added to it.
            hand_out(tables, computed_tokens if request_id in cached.resumed_req_ids else 0)
    return lists


def _controls(request: Request) -> str | None:
    """A request's own wishes as JSON; wrong ones are logged and ignored, because they must not fail the request."""
    params: dict[str, Any] | None = request.kv_transfer_params
    wishes = params.get(CONTROLS_KEY) if params else None
    if wishes is None:
        return None
    text = json.dumps(wishes)
    try:
        check_controls(text)
    except ConfigError as error:
        logger.warning("KV Cellar: request %s: kv_transfer_params.kvcellar ignored: %s", request.request_id, error)
        return None
    return text


def _watch(engine: TierEngine, pid: int) -> Watch | None:
    try:
        return engine.release_with(pid)
    except KvcellarError as error:
        logger.warning("KV Cellar: %s", error)
        return None


class PopulateProgress:
    """Logs the progress of populating the pool, at most every two seconds."""

    def __init__(self) -> None:
        self._next = time.monotonic() + 2.0

    def __call__(self, done: int, total: int) -> None:
        """Log, if it is time to. Both in bytes."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + 2.0
            logger.info("KV Cellar: populating the host pool, %.1f of %.1f GiB", done / _GIB, total / _GIB)
