"""``KVCellarConnector``: the class vLLM talks to. Every method hands over to the scheduler's or the worker's side.

Use: ``vllm serve MODEL --kv-transfer-config '{"kv_connector": "KVCellarConnector", "kv_role": "kv_both"}'``.
"""

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_events import KVCacheEvent
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
    PromMetric,
    PromMetricT,
)
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import KVConnectorOutput

from kvcellar import UnsupportedError, deployment, eligibility, groups, native_log, window
from kvcellar._native import Config
from kvcellar.groups import Groups
from kvcellar.hooks import hook, nothing
from kvcellar.metadata import RankReport, StepMetadata, WorkerReport
from kvcellar.scheduler import SchedulerSide
from kvcellar.stats import KVCellarPromMetrics, KVCellarStats, of_side, without_tiers
from kvcellar.worker import WorkerSide

if TYPE_CHECKING:
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

try:  # vLLM 0.31 does not tell sources apart.
    from vllm.v1.metrics.cache_hit_source import CacheHitSource
except ImportError:
    CacheHitSource = None

logger = init_logger(f"vllm.{__name__}")


def _described(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, config: Config, *, tell: bool) -> Groups | None:
    """The model's KV cache groups; None: this engine is served without KV Cellar.

    Raises:
        UnsupportedError: a group that cannot be kept, with ``"unsupported_groups": "error"``.
    """
    try:
        why = eligibility.why_nothing_is_kept(vllm_config, kv_cache_config, config)
        if why is None:
            return groups.describe(vllm_config, kv_cache_config)
    except UnsupportedError as error:
        if not config.bypass_unsupported_groups:
            raise
        why = str(error)
    if tell:
        logger.warning("KV Cellar keeps nothing in this engine, which is served without it: %s", why)
    return None


def _recompute_failed_loads(transfer: Any, outer: Any | None, config: Config) -> None:
    """See to it that a failed load costs time and not the request, or say what to write where we cannot.

    Args:
        transfer: the configuration that names us.
        outer: MultiConnector's configuration, whose policy vLLM reads then; it concerns the other connectors, too.
        config: our settings.
    """
    read = transfer if outer is None else outer
    if read.kv_load_failure_policy == "recompute" or config.strict_load_failure:
        return
    if outer is not None:
        logger.warning(
            "KV Cellar: a failed load fails its request (kv_load_failure_policy is %r). Write "
            '"kv_load_failure_policy": "recompute" beside "kv_connector": "MultiConnector" to have it computed.',
            read.kv_load_failure_policy,
        )
        return
    logger.info(
        "KV Cellar: kv_load_failure_policy set from %r to 'recompute', so that a failed load costs time and not the "
        'request. Write "strict_load_failure": true to keep it.',
        read.kv_load_failure_policy,
    )
    read.kv_load_failure_policy = "recompute"


def _stats_of_the_failed(_connector: "KVCellarConnector") -> KVConnectorStats:
    """What can be reported when reporting fails: that it does, and that nothing is in service."""
    return without_tiers(of_side(1, 0))


def _report_of_the_failed(connector: "KVCellarConnector") -> KVConnectorWorkerMetadata | None:
    """What a worker that cannot report has to say: without it the scheduler's side would wait for its copies."""
    if connector._worker is None:
        return None
    return WorkerReport({connector._worker.key: RankReport(trouble="it cannot report", released=True)})


def _all_from_host(_connector: "KVCellarConnector", _request: "Request", num_external_tokens: int) -> dict[Any, int]:
    """Where loaded tokens come from when that cannot be told: vLLM wants a sum."""
    return {CacheHitSource.HOST: num_external_tokens} if CacheHitSource is not None and num_external_tokens else {}


def _orders_of_the_retired(connector: "KVCellarConnector", _output: "SchedulerOutput") -> KVConnectorMetadata:
    """What workers have to do when a step cannot be planned."""
    return StepMetadata(b"") if connector._scheduler is None else connector._scheduler.orders_of_the_retired()


class KVCellarConnector(KVConnectorBase_V1, SupportsHMA):
    """vLLM's KV connector of KV Cellar.

    With an unsupported KV cache group and ``"unsupported_groups": "bypass"`` it has neither side and answers
    "nothing" to everything.

    Raises (construction):
        kvcellar.ConfigError: a setting that cannot work, named, with what to write instead.
        kvcellar.UnsupportedError: a vLLM version, KV cache group or deployment outside what this version serves.
    """

    scheduler_class = SchedulerSide
    worker_class = WorkerSide
    if CacheHitSource is not None:
        _cache_hit_source = CacheHitSource.HOST

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        window.check(window.vllm_version())
        eligibility.refuse_sleep_mode(vllm_config)
        config = Config.parse(json.dumps(self._kv_transfer_config.kv_connector_extra_config))
        described = _described(vllm_config, kv_cache_config, config, tell=role == KVConnectorRole.SCHEDULER)
        if described is None:
            return
        native_log.start()
        outer = deployment.outer_transfer_config()
        if role == KVConnectorRole.WORKER:
            self._worker = self.worker_class(vllm_config, kv_cache_config, config, beside_others=outer is not None)
            return
        _recompute_failed_loads(self._kv_transfer_config, outer, config)
        self._scheduler = self.scheduler_class(vllm_config, config, described, beside_others=outer is not None)

    def _hook_failed(self, hook: str, error: Exception) -> None:
        """Take out of service what raised ``error`` in ``hook``. Never raises."""
        try:
            if self._worker is not None:
                self._worker.fail(hook, error)
            if self._scheduler is not None:
                self._scheduler.fail(hook, error)
        except Exception:
            logger.exception("KV Cellar: %s failed, and so did taking the tiers out of service", hook)

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache: a block that is not kept is computed again, nothing is owed to anyone."""
        return False

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config: Any) -> bool:
        """vLLM 0.33: sleeping moves the KV cache, whose addresses the copy workers hold."""
        return False

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        """Block-major where the platform offers it: one contiguous run for each block over all layers.

        No wish beside other connectors: MultiConnector refuses to start when two wishes differ, and any layout can be
        copied.
        """
        if deployment.outer_transfer_config() is not None:
            return None
        return "BLHNC" if current_platform.is_cuda() else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        """Make a report from its plain data."""
        return KVCellarStats(data=data if data is not None else {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[type[PromMetric], type[PromMetricT]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics | None:
        """Our metrics on vLLM's ``/metrics``."""
        return KVCellarPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    @hook(nothing)
    def shutdown(self) -> None:
        """Let go of everything."""
        if self._worker is not None:
            self._worker.shutdown()
        if self._scheduler is not None:
            self._scheduler.shutdown()
        native_log.flush()

    @hook(_stats_of_the_failed)
    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """What changed since the last step."""
        if self._worker is not None:
            return self._worker.take_stats()
        return self._scheduler.take_stats() if self._scheduler is not None else None

    # -- worker ------------------------------------------------------------------------------------

    @hook(nothing)
    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """vLLM allocated its KV cache."""
        if self._worker is not None:
            self._worker.register(kv_caches)

    @hook(nothing)
    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """This rank's part of a block."""
        return self._worker.handshake() if self._worker is not None else None

    @hook(nothing)
    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """First hook of every step, before anything is written."""
        if self._worker is not None and isinstance(kv_connector_metadata, StepMetadata):
            self._worker.begin_step(kv_connector_metadata)

    @hook(nothing)
    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Blocks are prepared. Loads start here and not in `start_load_kv`, which would wait for the forward pass."""
        super().bind_connector_metadata(connector_metadata)
        if self._worker is not None:
            self._worker.start_loads()

    def start_load_kv(self, forward_context: "ForwardContext", **kwargs: Any) -> None:
        """Nothing is left to do: see `bind_connector_metadata`."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: loads are asynchronous, no running request depends on one."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: "AttentionMetadata", **kwargs: Any
    ) -> None:
        """Nothing to do for each layer: blocks are offloaded whole after the step."""

    @hook(nothing)
    def wait_for_save(self) -> None:
        """The forward pass is over: offloads start, and are not waited for."""
        if self._worker is not None:
            self._worker.finish_step()

    @hook(lambda *_: KVConnectorTransferResults())
    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Loads that ended."""
        return self._worker.results() if self._worker is not None else KVConnectorTransferResults()

    @hook(_report_of_the_failed)
    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """What the scheduler's side has to know of this worker."""
        return self._worker.take_report() if self._worker is not None else None

    # -- scheduler ---------------------------------------------------------------------------------

    @hook(nothing)
    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        """All ranks told their part of a block."""
        if self._scheduler is not None:
            self._scheduler.open(metadata)

    @hook(nothing)
    def bind_kv_cache_manager(self, kv_cache_manager: "KVCacheManager") -> None:
        """vLLM's block tables."""
        super().bind_kv_cache_manager(kv_cache_manager)
        if self._scheduler is not None:
            self._scheduler.bind(kv_cache_manager)

    @hook(nothing)
    def on_new_request(self, request: "Request") -> None:
        """A request arrived."""
        if self._scheduler is not None:
            self._scheduler.add(request)

    @hook(lambda *_: (0, False))
    def get_num_new_matched_tokens(self, request: "Request", num_computed_tokens: int) -> tuple[int | None, bool]:
        """How many tokens beyond vLLM's own can be loaded, asynchronously."""
        if self._scheduler is None:
            return 0, False
        return self._scheduler.lookup(request, num_computed_tokens)

    @hook(nothing)
    def update_state_after_alloc(self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int) -> None:
        """A request was admitted."""
        if self._scheduler is not None:
            self._scheduler.allocated(request, blocks, num_external_tokens)

    @hook(_all_from_host)
    def get_external_cache_hit_sources(self, request: "Request", num_external_tokens: int) -> dict[Any, int]:
        """Which of the loaded tokens come from host memory, and which from disk (vLLM 0.32 and later)."""
        if self._scheduler is None or num_external_tokens == 0 or CacheHitSource is None:
            return {}
        disk = min(self._scheduler.disk_tokens(request), num_external_tokens)
        split = {CacheHitSource.HOST: num_external_tokens - disk, CacheHitSource.DISK: disk}
        return {source: tokens for source, tokens in split.items() if tokens}

    @hook(_orders_of_the_retired)
    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> KVConnectorMetadata:
        """The step's orders."""
        if self._scheduler is None:
            return StepMetadata(b"")
        return self._scheduler.step(scheduler_output)

    @hook(nothing)
    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """What the workers reported."""
        if self._scheduler is not None:
            self._scheduler.output(connector_output)

    def request_finished(self, request: "Request", block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """A request of a model with one group ended. Its blocks are freed at once; fences protect what is still
        copied.
        """
        return self.request_finished_all_groups(request, (block_ids,))

    @hook(lambda *_: (False, None))
    def request_finished_all_groups(
        self, request: "Request", block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """A request ended. Its blocks are freed at once; fences protect what is still copied."""
        return False, self._scheduler.finish(request) if self._scheduler is not None else None

    @hook(lambda *_: False)
    def has_pending_push_work(self) -> bool:
        """Whether an idle engine should step: copies to notice, events to publish."""
        return self._scheduler is not None and self._scheduler.has_pending_work()

    @hook(lambda *_: ())
    def take_events(self) -> Iterable[KVCacheEvent]:
        """Events of our tiers."""
        return self._scheduler.take_events() if self._scheduler is not None else ()

    @hook(lambda *_: False)
    def reset_cache(self) -> bool | None:
        """Everything stored so far is worthless."""
        if self._scheduler is not None:
            self._scheduler.reset()
        return True
