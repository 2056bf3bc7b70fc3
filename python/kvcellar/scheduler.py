"""The connector's part in EngineCore: translates vLLM's scheduler into calls of the native tier engine.

One native call a request or a step; nothing is decided here and no loop runs over blocks.

States: *waiting* (ranks have not told their part of a block, or the pool is being opened), *serving*, and *retired*
after an internal error or where the tiers cannot be had. A retired side answers vLLM with nothing; loads under way end,
and once every worker has let go of the pool, so does this side.
"""

import multiprocessing
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.kv_events import KVCacheEvent
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata
from vllm.logger import init_logger
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

from kvcellar import KvcellarError, deployment, eligibility, opening, states, window
from kvcellar._native import Config, RemovedRun, StoredRun, TierEngine, Watch
from kvcellar.adapters import NOT_YET, AdapterReport, Adapters
from kvcellar.due import Due
from kvcellar.events import EventMaker
from kvcellar.groups import Groups
from kvcellar.metadata import RankOffer, StepMetadata, WorkerReport
from kvcellar.offers import GroupOffer, Offer
from kvcellar.others import ForeignBlocks
from kvcellar.prefill import PrefillTimer
from kvcellar.requests import (
    CONTROLS_KEY,
    NEVER,
    AskAgain,
    KnownRequest,
    LeftOut,
    UnusableRequest,
    controls,
    forgets,
    plain,
    salt,
)
from kvcellar.stats import KVCellarStats, of_side, with_engine, without_tiers
from kvcellar.steps import handed_out

logger = init_logger(f"vllm.{__name__}")

_block_id = attrgetter("block_id")
_NOTHING = StepMetadata(b"")
# How long an idle vLLM is kept stepping for the pool to be opened, and after retiring for the
# workers to let go.
_START_PATIENCE_S = 300.0
_RETIRE_PATIENCE_S = 10.0


class SchedulerSide:
    """Scheduler role of the connector."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        config: Config,
        groups: Groups,
        *,
        beside_others: bool,
    ) -> None:
        self._vllm_config = vllm_config
        self._groups = groups
        events = vllm_config.kv_events_config
        publishes = bool(events and events.enable_kv_cache_events)
        self._engines = deployment.local_engines(vllm_config, config)
        self._config = config.narrowed(publishes)
        self._engine = TierEngine(self._config, groups.native())
        self._events = EventMaker(groups)
        self._publishes = self._config.events
        self._manager: KVCacheManager | None = None
        self._foreign = ForeignBlocks(groups) if beside_others else None
        self._requests: dict[str, KnownRequest] = {}
        self._due = Due()
        self._left_out_ids: set[str] = set()
        self._left_out = LeftOut()
        self._adapters = Adapters(self._world())
        # Number of the step that was planned last: it tells which requests ran with an adapter that
        # was exchanged.
        self._step = 0
        self._numbers_steps = vllm_config.lora_config is not None
        # vLLM refused to clear its own cache when ours was cleared: what it finds there may be old.
        self._vllm_keeps_old_blocks = False
        self._names = 0
        # Loads that vLLM waits for, and those of them that no step has ordered yet: vLLM's id and
        # the engine's name.
        self._loading: dict[str, str] = {}
        self._unordered: dict[str, str] = {}
        # The engine has something under way, or may have counted something: most decode steps need
        # not ask it.
        self._active = True
        self._counted = True
        self._prefill = PrefillTimer()
        self._offers: dict[tuple[int, int], RankOffer] = {}
        self._opening: threading.Thread | None = None
        self._opened = False
        self._ticket: str | None = None
        self._attaching = 0
        self._patience_until = time.monotonic() + _START_PATIENCE_S
        self._errors = 0
        self._retired = False
        self._released: set[tuple[int, int]] = set()
        self._closed = False
        # The pool may be opened beside requests: whoever ends last closes it.
        self._closing = threading.Lock()
        # Events that were taken from the engine and not by vLLM.
        self._last_events: list[KVCacheEvent] = []
        self._events_taken = False
        self._watch: Watch | None = None
        parent = multiprocessing.parent_process()
        self._front_end = parent.pid if parent is not None else None

    # -- start -------------------------------------------------------------------------------------

    def bind(self, manager: KVCacheManager) -> None:
        """vLLM's own block tables, to be read anew in every step."""
        self._manager = manager

    def open(self, offers: Mapping[tuple[int, int], KVConnectorHandshakeMetadata]) -> None:
        """Open the pool if every rank has told its part of a block. Other connectors' metadata is none of ours."""
        self._add_offers({key: offer for key, offer in offers.items() if isinstance(offer, RankOffer)})
        if self._is_complete():
            self._open()

    def _add_offers(self, offers: Mapping[tuple[int, int], RankOffer]) -> None:
        if not self._opened:
            # vLLM 0.33 repeats the handshake after a sleep; the pool and its workers are as they
            # were.
            self._offers.update(offers)

    def _world(self) -> int:
        parallel = self._vllm_config.parallel_config
        return int(parallel.pipeline_parallel_size * parallel.tensor_parallel_size)

    def _is_complete(self) -> bool:
        waits = not (self._opened or self._retired) and self._opening is None
        return waits and len(self._offers) == self._world()

    def _open(self) -> None:
        try:
            opening.open_pool(self._engine, self._vllm_config, self._offers, self._engines)
            self._ticket = self._engine.ticket()
        except KvcellarError as error:
            # A mistake or a machine that has no room: vLLM serves all the same.
            logger.error("KV Cellar: this engine is served without its tiers: %s", error)
            self.retire()
            return
        with self._closing:
            if self._closed:
                # The end came while the pool was being made: nobody closes again.
                self._engine.close()
                return
            self._opened = True
        if self._front_end is not None:
            self._watch = _watch(self._engine, self._front_end)

    def _open_beside_requests(self) -> None:
        """As `_open`, while vLLM serves already: populating a large pool takes longer than a step may."""

        def work() -> None:
            try:
                self._open()
            except Exception as error:  # noqa: BLE001  (the end of this thread: nobody above it could do more)
                self.fail("opening the pool", error)

        self._opening = threading.Thread(target=work, name="kvcellar-open", daemon=True)
        self._opening.start()

    # -- end ---------------------------------------------------------------------------------------

    def shutdown(self) -> None:
        """Let go of the pool; its contents stay for the next start unless ``keep_pool`` is false."""
        self._watch = None
        self._close()

    def _close(self) -> None:
        with self._closing:
            self._closed = True
            self._engine.close()

    def fail(self, where: str, error: Exception) -> None:
        """An internal error: take the tiers out of service. Never raises."""
        self._errors += 1
        self._counted = True
        if self._retired:
            logger.debug("KV Cellar: %s failed after the tiers went out of service: %r", where, error)
            return
        logger.error(
            "KV Cellar: internal error in %s. The tiers are out of service until the next start, vLLM serves without "
            "them. Please report this",
            where,
            exc_info=error,
        )
        self.retire()

    def retire(self) -> None:
        """Take the tiers out of service: no more stores and loads, and an orderly end of those under way."""
        if self._retired:
            return
        self._retired = True
        self._active = self._counted = True
        self._patience_until = time.monotonic() + _RETIRE_PATIENCE_S
        self._requests.clear()
        self._due.clear()
        self._left_out_ids.clear()
        # It would keep every request that comes.
        self._foreign = None
        if not self._publishes:
            return
        try:
            self._engine.withdraw()
            while runs := self._engine.take_events(self._events.integer_hashes):
                self._add_events(runs)
        except Exception:
            logger.exception("KV Cellar: subscribers could not be told that the tiers went out of service")

    def orders_of_the_retired(self) -> StepMetadata:
        """What workers have to do once this side is retired."""
        failed, self._unordered = tuple(self._unordered), {}
        if self._closed and not failed:
            return _NOTHING
        return StepMetadata(b"", failed=failed, retire=not self._closed)

    def _close_when_released(self) -> None:
        if self._retired and not self._closed and len(self._released) == self._world():
            self._counted = True
            self._close()

    # -- one request's way -------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """A request arrived, or was rewritten."""
        if self._retired:
            return
        known = self._requests.pop(request.request_id, None)
        if known is not None:
            self._note_end(known)
        try:
            self._refuse_unusable(request)
            wishes = controls(request)
            adapter = self._adapter(request)
        except UnusableRequest as error:
            self._leave_out(request, error)
            return
        except AskAgain:
            return
        self._left_out_ids.discard(request.request_id)
        lora = request.lora_request.name if request.lora_request is not None else ""
        name = known.name if known is not None else self._name(request.request_id)
        self._engine.add_request(name, wishes, lora, adapter, salt(request))
        known = self._requests[request.request_id] = KnownRequest(request, name, self._groups)
        if request.num_computed_tokens > 0:
            self._due.admitted(known)

    def _note_end(self, known: KnownRequest) -> None:
        """No step offers anything more of this request. What was computed for it belongs to the adapter that it had."""
        self._due.ended(known)
        adapter = known.request.lora_request
        if adapter is not None and known.last_step > 0:
            self._adapters.finished(adapter.lora_int_id, known.last_step)

    def _leave_out(self, request: Request, why: UnusableRequest) -> None:
        self._left_out_ids.add(request.request_id)
        self._left_out.add(request, why)
        self._counted = True

    def _let_go(self, known: KnownRequest, why: UnusableRequest) -> None:
        """Leave out a request that the native engine knows already."""
        request = known.request
        self._note_end(known)
        self._leave_out(request, why)
        self._requests.pop(request.request_id, None)
        self._engine.finish(known.name, request.num_prompt_tokens, request.num_tokens, None)

    def _adapter(self, request: Request) -> bytes:
        """The identity of the request's LoRA adapter, which its blocks are kept under; empty without one.

        Raises:
            UnusableRequest: the workers have not loaded what the adapter's files hold now.
            AskAgain: no worker has told yet what it loaded.
        """
        found = self._adapters.identity(request.lora_request)
        if found is None:
            raise UnusableRequest(
                "its LoRA adapter is not (yet) loaded as its files are now, so nobody knows whose KV this is",
                usual=True,
            )
        if found == NOT_YET:
            raise AskAgain
        return bytes(found)

    def _name(self, request_id: str) -> str:
        if plain(request_id):
            return request_id
        self._names += 1
        return f"#{self._names}"

    def _refuse_unusable(self, request: Request) -> None:
        if eligibility.has_numbered_media(self._vllm_config, request):
            raise UnusableRequest("its media are named by a counter (prefix caching and mm_processor_cache_gb are off)")
        if getattr(request, "resumable", False) and window.keeps_stale_hashes():
            raise UnusableRequest("this vLLM leaves stale hashes in streaming sessions")
        if forgets(request) and not request.cache_salt:
            raise UnusableRequest("it wants to forget everything of its cache_salt, and has none")
        if request.lora_request is not None and not request.lora_request.name.isprintable():
            raise UnusableRequest("its adapter's name cannot be printed")

    def lookup(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """vLLM's question: how many tokens beyond its own can be loaded?"""
        if self._retired or request.request_id in self._left_out_ids:
            return 0, False
        known = self._requests.get(request.request_id)
        if known is None or known.request is not request or known.was_rewritten():
            self.add(request)
            known = self._requests.get(request.request_id)
            if known is None:
                self._active = True
                # Neither known nor left out: the next step's reports tell.
                return 0 if request.request_id in self._left_out_ids else None, False
        # A lookup leaves nothing under way: an engine that is quiet stays so.
        self._counted = True
        may_have_begun = num_computed_tokens > 0 or self._groups.are_found_in_parts
        if may_have_begun and self._begins_with_doubt(request):
            self._let_go(known, UnusableRequest("vLLM may have computed its begin with other weights", usual=True))
            return 0, False
        if known.forgets:
            # Places are to be erased, and subscribers to be told, also when the client goes away.
            self._active = True
        known.looked_up(num_computed_tokens, self._groups)
        hit = self._engine.lookup(known.name, request.num_tokens, num_computed_tokens, known.new_hashes())
        return hit, bool(hit)

    def _begins_with_doubt(self, request: Request) -> bool:
        """Whether what vLLM found in its own cache may have been computed with other weights than the present ones."""
        if self._vllm_keeps_old_blocks:
            return True
        if request.lora_request is None or not self._adapters.is_mixed(request.lora_request):
            return False
        logger.warning_once(
            "KV Cellar: different LoRA adapters have been loaded under one name, and vLLM's own cache does not tell "
            "their blocks apart: requests that it finds there are neither stored nor loaded, and may be answered with "
            "the old adapter's KV by vLLM itself. Load a changed adapter under a new name"
        )
        return True

    def allocated(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """vLLM admitted the request; what it wants from us has its blocks now."""
        known = self._requests.get(request.request_id)
        if num_external_tokens > 0:
            name = known.name if known is not None else request.request_id
            self._loading[request.request_id] = self._unordered[request.request_id] = name
        elif self._foreign is not None:
            self._foreign.admitted(request, known)
        if self._retired or known is None:
            return
        self._active = self._counted = True
        self._due.admitted(known)
        tables: list[list[int]] = []
        if num_external_tokens > 0:
            known.loaded = num_external_tokens
            end = known.local + num_external_tokens
            for group, table in zip(self._groups.groups, blocks.blocks, strict=True):
                first = known.local // group.block_tokens
                tables.append(list(map(_block_id, table[first : -(-end // group.block_tokens)])))
            if self._foreign is not None:
                self._foreign.loaded_by_us(tables)
        self._engine.admit(known.name, num_external_tokens, tables)

    def disk_tokens(self, request: Request) -> int:
        """Tokens of the request's last admission that come from disk."""
        known = self._requests.get(request.request_id)
        return 0 if known is None else self._engine.disk_tokens(known.name)

    def finish(self, request: Request) -> dict[str, Any] | None:
        """vLLM finished or aborted the request and is about to free its blocks: they may still be copied, behind
        fences.

        Returns:
            ``kv_transfer_params`` of its answer.
        """
        self._left_out_ids.discard(request.request_id)
        known = self._requests.pop(request.request_id, None)
        if known is None or self._retired:
            return None
        self._note_end(known)
        self._active = self._counted = True
        if not self._requests:
            self._prefill.idle()
        told = self._forgotten(known) if known.forgets else None
        self._tell_prefill()
        offer = None
        if not known.was_rewritten():
            # Before its first step a request has only what vLLM found in its own cache: the rest
            # may never have come.
            computed = request.num_computed_tokens
            offer = self._offer(known, computed if known.scheduled else min(computed, known.local))
        self._engine.finish(known.name, request.num_prompt_tokens, request.num_tokens, offer)
        return told

    def _forgotten(self, known: KnownRequest) -> dict[str, Any] | None:
        """What a request that forgets its salt is told; None while that is not done."""
        report = self._engine.forgotten(known.name)
        if report is None:
            return None
        logger.info(
            "KV Cellar: a client's cache_salt is forgotten: %d blocks in memory and %d on disk are gone, %.2f GiB are "
            "overwritten, %d places on disk could not be",
            report.dram_blocks,
            report.nvme_blocks,
            report.bytes_erased / opening.GIB,
            report.failed,
        )
        names = ("dram_blocks", "nvme_blocks", "slots_erased", "extents_erased", "bytes_erased", "failed")
        return {CONTROLS_KEY: {"forgotten": {name: getattr(report, name) for name in names}}}

    # -- one step's way ----------------------------------------------------------------------------

    def step(self, output: SchedulerOutput) -> StepMetadata:
        """Plan the copies of a step that vLLM has just scheduled."""
        if self._retired:
            return self.orders_of_the_retired()
        if self._numbers_steps:
            self._step += 1
            self._adapters.heard_until(self._step - self._vllm_config.max_concurrent_batches)
        self._prefill.step(output)
        handed: list[list[int]] | None = None
        foreign: list[int] = []
        if self._foreign is not None and self._manager is not None:
            handed = handed_out(output, self._groups)
            foreign = self._foreign.step(handed, self._manager)
        offers = self._offers_of(output)
        if not (offers or foreign or self._active or self._ticket is not None):
            return StepMetadata(b"", number=self._step) if self._numbers_steps else _NOTHING
        self._counted = True
        if handed is None:
            handed = handed_out(output, self._groups)
        self._tell_prefill()
        plan, quiet = self._engine.step(offers, handed, foreign, self._groups.written_early)
        ticket, self._ticket = self._ticket, None
        if ticket is not None:
            self._attaching = self._vllm_config.max_concurrent_batches + 1
        self._active = not quiet
        ordered, self._unordered = self._unordered, {}
        loads = {name: request_id for request_id, name in ordered.items()}
        front_end = self._front_end if ticket is not None else None
        return StepMetadata(plan, ticket, front_end, loads, number=self._step)

    def _offers_of(self, output: SchedulerOutput) -> list[Offer]:
        """What the requests of a step complete in it."""
        offers = []
        scheduled_tokens = output.num_scheduled_tokens
        if self._numbers_steps:
            self._note_step(scheduled_tokens)
        told = states.told(output, self._groups)
        looked_at = self._due.in_step(scheduled_tokens, output.total_num_scheduled_tokens)
        if told:
            # vLLM also tells of requests that this step leaves out.
            already = {known.request.request_id for known in looked_at}
            looked_at += filter(None, (self._requests.get(name) for name in told if name not in already))
        for known in looked_at:
            request = known.request
            scheduled = scheduled_tokens.get(request.request_id, 0)
            known.scheduled = known.scheduled or scheduled > 0
            ready = request.num_computed_tokens + scheduled
            fresh = states.NO_STATES
            if told and request.request_id in told:
                fresh = self._states(request, scheduled, told[request.request_id])
            if ((scheduled > 0 and ready >= known.next_tokens) or fresh) and (
                offer := self._offer(known, ready, fresh)
            ) is not None:
                offers.append(offer)
            if self._requests.get(request.request_id) is known:
                self._due.looked_at(known, ready)
        return offers

    def _note_step(self, scheduled_tokens: Iterable[str]) -> None:
        """Take note of which requests ran with their adapters in this step."""
        for known in filter(None, map(self._requests.get, scheduled_tokens)):
            known.last_step = self._step

    def _tell_prefill(self) -> None:
        """Tell the engine what was measured, where it is asked something anyway."""
        tokens, seconds = self._prefill.take()
        if tokens:
            self._engine.prefilled(tokens, seconds)

    def _states(self, request: Request, scheduled: int, told: states.States) -> states.States:
        if self._manager is None:
            return states.NO_STATES
        return states.held(told, request, scheduled, self._groups, self._manager.block_pool.blocks)

    def _offer(self, known: KnownRequest, ready: int, held: states.States = states.NO_STATES) -> Offer | None:
        """Blocks that are complete once ``ready`` tokens are, as far as tokens and hashes are known.

        Args:
            known: the request.
            ready: complete tokens.
            held: blocks that hold a state, of groups whose tables do not tell.
        """
        request = known.request
        # Placeholders of async scheduling and rejected speculative tokens have no hash yet.
        ready = min(ready, request.num_tokens, len(request.block_hashes) * self._groups.hash_tokens)
        if (ready < known.next_tokens and not held) or self._manager is None:
            return None
        tables = self._manager.get_blocks(request.request_id).blocks
        try:
            if self._foreign is None and not self._groups.hold_states:
                start, groups = known.take_plain(self._groups, tables, ready)
            else:
                start, ready, groups = self._take(known, tables, ready, held)
        except UnusableRequest as error:
            self._let_go(known, error)
            return None
        return (known.name, known.new_hashes(), start, request.all_token_ids[start:ready], groups)

    def _take(
        self, known: KnownRequest, tables: Sequence[Sequence[KVCacheBlock]], ready: int, held: states.States
    ) -> tuple[int, int, list[GroupOffer]]:
        """Take note of what is offered of a request, where a group holds states or other connectors load, too.

        Returns:
            The first token of what is offered, the token behind it, and the offer.

        Raises:
            UnusableRequest: what went into the block hashes beside tokens cannot be written down.
        """
        fresh = [
            states.in_a_row(held.get(index, {}))
            if group.holds_states
            else known.not_offered(index, group, table, ready)
            for index, (group, table) in enumerate(zip(self._groups.groups, tables, strict=True))
        ]
        next_tokens = None
        if self._foreign is not None:
            bound = self._foreign.bound(known, fresh, ready)
            if bound < ready:
                # Until the next lookup nothing more is offered than what lies before.
                known.limit = bound
                next_tokens, ready = NEVER, bound
        groups = [known.take_group(index, self._groups, part, ready) for index, part in enumerate(fresh)]
        known.next_tokens = next_tokens or known.tokens_of_next_block(self._groups)
        offered = zip(self._groups.groups, groups, strict=True)
        start = min((first * group.block_tokens for group, (first, blocks, _) in offered if blocks), default=ready)
        return start, ready, groups

    def output(self, output: KVConnectorOutput) -> None:
        """What the workers reported after a step."""
        report = output.kv_connector_worker_meta
        if isinstance(report, WorkerReport):
            self._hear(report)
        if self._attaching:
            # Outputs of steps that were under way when the ticket was sent come first; after them
            # every worker is attached.
            self._attaching -= 1
            if self._attaching == 0 and not self._retired:
                self._engine.attached()
        # Other connectors' loads are reported by the same list.
        ended: list[str] = []
        lost: list[str] = []
        for request_id in output.finished_recving or ():
            if (name := self._loading.pop(request_id, None)) is not None:
                ended.append(name)
                if request_id in (output.failed_recving or ()):
                    lost.append(name)
        if ended and not self._closed:
            self._active = self._counted = True
            self._engine.loads_ended(ended, lost)

    def _hear(self, report: WorkerReport) -> None:
        """Act on what the ranks told."""
        for key, rank in report.ranks.items():
            if rank.offer is not None:
                self._add_offers({key: rank.offer})
            if rank.released:
                self._released.add(key)
            if rank.adapters is not None:
                self._hear_of_adapters(rank.adapters)
            if rank.trouble is not None and not self._retired:
                # The worker has counted it, if it was an internal error.
                logger.error("KV Cellar: a worker is out of service, and so are the tiers: %s", rank.trouble)
                self.retire()
        self._close_when_released()
        if self._is_complete():
            self._open_beside_requests()

    def _hear_of_adapters(self, report: AdapterReport) -> None:
        """Act on what a rank has loaded: requests that ran with an exchanged adapter may have stored wrong blocks."""
        exchanged = self._adapters.confirm(report)
        if not exchanged or self._closed:
            return
        since = min(rank.since for rank in report.ranks.values())
        ran = self._adapters.finished_since(exchanged, since)
        running = [
            known
            for known in self._requests.values()
            if known.request.lora_request is not None and known.request.lora_request.lora_int_id in exchanged
        ]
        for known in running:
            ran = ran or known.last_step > since
            self._let_go(known, UnusableRequest("its LoRA adapter was exchanged while it ran"))
        if ran:
            logger.warning(
                "KV Cellar: a LoRA adapter was exchanged while requests ran with it. What they stored since cannot be "
                "told apart, so both tiers are emptied"
            )
            self._active = self._counted = True
            if self._engine.reset().kept:
                self.retire()

    # -- asked by vLLM now and then ----------------------------------------------------------------

    def has_pending_work(self) -> bool:
        """Whether vLLM should keep stepping although no request runs."""
        if self._retired:
            waits = bool(self._last_events or self._unordered) or not self._closed
            return waits and time.monotonic() < self._patience_until
        if self._foreign is not None and (not self._opened or self._ticket is not None):
            # There was no handshake: only a step brings the workers' offers, and the pool to them.
            return time.monotonic() < self._patience_until
        return self._active and self._engine.pending_work()

    def take_events(self) -> Iterable[KVCacheEvent]:
        """Events of our tiers since the last step."""
        if not self._publishes:
            return ()
        if self._retired or self._events_taken:
            self._events_taken = False
        elif self._active or self._config.has_disk:
            # A disk may lose blocks while nothing is asked of the engine.
            self._add_events(self._engine.take_events(self._events.integer_hashes))
        events, self._last_events = self._last_events, []
        return events

    def _add_events(self, runs: Iterable[StoredRun | RemovedRun]) -> None:
        self._last_events += [self._events.make(run) for run in runs]

    def take_stats(self) -> KVCellarStats | None:
        """What changed since the last step. vLLM asks for events next: they come with the same call."""
        if not self._counted:
            return None
        # Once more after the last step that had something under way.
        self._counted = self._active and not self._retired
        errors, self._errors = self._errors, 0
        own = of_side(errors, self._left_out.take(), in_service=self._opened and not self._retired)
        if self._retired:
            return without_tiers(own)
        runs, stats = self._engine.take_report(self._publishes, self._events.integer_hashes)
        self._add_events(runs)
        self._events_taken = self._publishes
        return own if stats is None else with_engine(own, stats)

    def reset(self) -> None:
        """Everything stored so far is worthless: weights changed."""
        self._active = self._counted = True
        if self._closed:
            return
        report = self._engine.reset()
        if report.kept:
            logger.info("KV Cellar: vLLM cleared its caches; both tiers are kept (on_reset: keep)")
            return
        self._vllm_keeps_old_blocks = self._uses_blocks()
        logger.warning(
            "KV Cellar: vLLM cleared its caches, and weights may have changed: %d blocks in memory and %d on disk "
            "(%.2f GiB) are dropped, and what is stored from now on is used by this process alone. /pause and /sleep "
            'clear caches, too: where weights never change in a running engine, write "on_reset": "keep"',
            report.blocks_dropped_dram,
            report.blocks_dropped_nvme,
            report.bytes / opening.GIB,
        )

    def _uses_blocks(self) -> bool:
        """Whether vLLM has blocks in use; then it has refused to clear its own cache, and tells us to clear ours."""
        if self._manager is None:
            return False
        pool = self._manager.block_pool
        # The null block is always in use.
        return int(pool.num_gpu_blocks - pool.get_num_free_blocks()) > 1


def _watch(engine: TierEngine, pid: int) -> Watch | None:
    try:
        return engine.release_with(pid)
    except KvcellarError as error:
        logger.warning("KV Cellar: %s", error)
        return None
