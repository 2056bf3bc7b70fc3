"""The connector's part in each worker: hands vLLM's KV tensors and every step's plan to the native copy worker."""

import multiprocessing
import platform
import time
from collections.abc import Mapping

import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.distributed.parallel_state import get_pp_group, get_tp_group
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import KVCacheConfig

from kvcellar import KvcellarError, UnsupportedError, facts, groups, nvrtc, views
from kvcellar._native import Config, CopyWorker, Watch
from kvcellar.adapters import LOADS, Loads
from kvcellar.metadata import RankOffer, RankReport, StepMetadata, WorkerReport
from kvcellar.stats import KVCellarStats, of_side, of_worker

logger = init_logger(f"vllm.{__name__}")

# How long a stopping worker may go on giving checksums to what it offloaded last; vLLM allows 5 s
# for everything.
HASHING_AT_SHUTDOWN_S = 1.0
# How long copies may take to end where letting go of the pool failed: far longer than any copy.
_COPIES_PATIENCE_S = 30.0
_TROUBLE_CHARACTERS_MAX = 500


class WorkerSide:
    """Worker role of the connector.

    States: *serving*, and *out of service* after an internal error of either side. Out of service it starts no copy;
    every load that vLLM waits for is reported, exactly once.

    Attributes:
        key: this worker's (pipeline, tensor) rank.
    """

    def __init__(
        self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, config: Config, *, beside_others: bool
    ) -> None:
        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._config = config
        self._beside_others = beside_others
        self.key = (get_pp_group().rank_in_group, get_tp_group().rank_in_group)
        self._rank = self.key[0] * vllm_config.parallel_config.tensor_parallel_size + self.key[1]
        self._adapters: Loads | None = None
        if vllm_config.lora_config is not None:
            self._adapters = LOADS
            LOADS.observe()
        self._native: CopyWorker | None = None
        self._kv_caches: dict[str, views.KVCaches] = {}
        self._gpu: int | None = None
        # Loads that were ordered and not reported: the native worker's name of each request, and
        # vLLM's id of it.
        self._loads: dict[str, str] = {}
        self._never_ordered: set[str] = set()
        self._step = 0
        self._out_of_service = False
        self._report = RankReport()
        self._errors = 0
        self._watches: list[Watch] = []

    def _group_views(self, kv_caches: Mapping[str, views.KVCaches]) -> list[list[views.LayerView]]:
        """This rank's layers of every group."""
        return views.group_views(self._kv_cache_config, kv_caches)

    # -- start -------------------------------------------------------------------------------------

    def register(self, kv_caches: Mapping[str, views.KVCaches]) -> None:
        """vLLM allocated its KV cache.

        Args:
            kv_caches: per layer, a view of shape ``[kernel blocks, ...]``, or several of a layer that holds states.
                Kept referenced until `shutdown`, because the native side holds their addresses.

        A layout that cannot be copied, or a device without a copier, takes this worker out of service.
        """
        try:
            self._register(kv_caches)
        except UnsupportedError as error:
            self._stop(str(error))

    def _register(self, kv_caches: Mapping[str, views.KVCaches]) -> None:
        self._gpu = _gpu_of(kv_caches)
        self._kv_caches = dict(kv_caches)
        layers = views.native(self._group_views(kv_caches))
        self._native = CopyWorker(
            self._config, self._rank, layers, self._gpu, nvrtc.libraries() if self._gpu is not None else []
        )
        if self._beside_others:
            # MultiConnector passes on one handshake only, and other connectors refuse what is not
            # theirs.
            self._report.offer = self._offer()
        parent = multiprocessing.parent_process()
        if parent is not None:
            self._release_with(self._native, parent.pid)

    def _release_with(self, native: CopyWorker, pid: int | None) -> None:
        """Let go of the pool when a process ends without which no work comes any more."""
        if pid is None:
            return
        try:
            self._watches.append(native.release_with(pid))
        except KvcellarError as error:
            logger.warning("KV Cellar: %s", error)

    def handshake(self) -> RankOffer | None:
        """What the scheduler's side must know before it can make a pool; None beside other connectors."""
        return None if self._beside_others else self._offer()

    def _offer(self) -> RankOffer | None:
        if self._native is None:
            return None
        layout = self._kv_cache_config.kv_cache_layout or "unknown"
        native = self._native
        return RankOffer(
            facts.machine(),
            layout,
            _isa(self._gpu),
            tuple(native.block_bytes),
            native.near_node,
            facts.attention(self._vllm_config),
            groups.shares(self._vllm_config, self._kv_cache_config, self.key[1]),
            self._vllm_config.parallel_config.cp_kv_cache_interleave_size,
        )

    # -- one step's way ----------------------------------------------------------------------------

    def begin_step(self, metadata: StepMetadata) -> None:
        """Before anything of this step is written: attach when told to, start early offloads, wait for fences."""
        self._step = metadata.number
        self._loads.update(metadata.loads)
        self._never_ordered.update(metadata.failed)
        if metadata.retire:
            self._leave_service()
        if self._native is None or self._out_of_service:
            return
        if metadata.ticket is not None:
            self._release_with(self._native, metadata.front_end)
            self._attach(self._native, metadata.ticket)
        if metadata.plan and not self._out_of_service:
            self._native.begin_step(metadata.plan, self._stream())

    def _attach(self, native: CopyWorker, ticket: str) -> None:
        try:
            native.attach(ticket)
        except KvcellarError as error:
            # The machine's doing, not a bug: memory, rights, a pool that was removed.
            self._stop(f"cannot attach to the host pool: {error}")

    def start_loads(self) -> None:
        """Blocks are prepared: loads may start, beside the forward pass."""
        if self._native is not None and not self._out_of_service:
            self._native.start_loads(self._stream())

    def finish_step(self) -> None:
        """The forward pass is over: offload what it completed."""
        if self._native is not None and not self._out_of_service:
            self._native.finish_step(self._stream())

    def results(self) -> KVConnectorTransferResults:
        """Loads that ended since the last step; failed ones are among the finished ones too."""
        lost, self._never_ordered = self._never_ordered, set()
        if self._native is None or self._out_of_service:
            # No copy is under way any more (see `_leave_service`): whatever was not reported has
            # failed.
            lost.update(self._loads.values())
            self._loads = {}
            return KVConnectorTransferResults(finished_recving=lost, failed_recving=set(lost))
        finished, failed = self._native.take_results()
        ended = {name: request_id for name in finished if (request_id := self._loads.pop(name, None)) is not None}
        lost.update(ended[name] for name in failed if name in ended)
        return KVConnectorTransferResults(finished_recving=lost | set(ended.values()), failed_recving=lost)

    # -- end ---------------------------------------------------------------------------------------

    def fail(self, where: str, error: Exception) -> None:
        """An internal error: take this worker out of service, and tell the scheduler's side. Never raises."""
        self._errors += 1
        if self._out_of_service:
            logger.debug("KV Cellar: %s failed out of service: %r", where, error)
            return
        logger.error(
            "KV Cellar: internal error in %s. This worker is out of service until the next start. Please report this",
            where,
            exc_info=error,
        )
        self._report.trouble = f"{where}: {type(error).__name__}: {error}"[:_TROUBLE_CHARACTERS_MAX]
        self._leave_service()

    def _stop(self, why: str) -> None:
        """Take this worker out of service for a reason that is no bug, and tell the scheduler's side."""
        logger.error("KV Cellar: this worker is out of service: %s", why)
        self._report.trouble = why[:_TROUBLE_CHARACTERS_MAX]
        self._leave_service()

    def _leave_service(self) -> None:
        """Let every copy that is under way end, then let go of the pool. Never raises."""
        if self._out_of_service:
            return
        self._out_of_service = True
        self._report.released = True
        self._watches = []
        if self._native is None:
            return
        try:
            self._native.release(0.0)
        except Exception:
            logger.exception("KV Cellar: the pool could not be released")
            self._wait_for_copies()

    def _wait_for_copies(self) -> None:
        """Where letting go of the pool failed: copies under way must still end before their blocks are given back."""
        deadline = time.monotonic() + _COPIES_PATIENCE_S
        try:
            while self._native is not None and self._native.in_flight() > 0 and time.monotonic() < deadline:
                time.sleep(0.001)
        except Exception:
            logger.exception("KV Cellar: copies under way could not be waited for")

    def take_report(self) -> WorkerReport | None:
        """What the scheduler's side has to know, told once."""
        if self._adapters is not None:
            self._report.adapters = self._adapters.take_report(self._rank, self._step)
        report, self._report = self._report, RankReport()
        return None if report == RankReport() else WorkerReport({self.key: report})

    def take_stats(self) -> KVCellarStats | None:
        """What was copied since the last step. Says in the log what a GPU's copier has to say."""
        if self._errors:
            errors, self._errors = self._errors, 0
            return of_side(errors, 0)
        if self._native is None or self._out_of_service:
            return None
        if self._gpu is not None:
            for note in self._native.take_notes():
                logger.info("KV Cellar: GPU %d: %s", self._gpu, note)
        report = self._native.take_stats()
        return None if report is None else of_worker(report)

    def _stream(self) -> int | None:
        """Handle of the stream on which vLLM computes at this moment; none in host memory."""
        if self._gpu is None:
            return None
        stream: int = torch.cuda.current_stream(self._gpu).cuda_stream
        return stream

    def shutdown(self) -> None:
        """Finish what is in flight and let go of the pool, then of vLLM's tensors."""
        self._watches = []
        if self._native is not None and not self._out_of_service:
            self._native.release(HASHING_AT_SHUTDOWN_S)
        self._kv_caches = {}


def _gpu_of(kv_caches: Mapping[str, views.KVCaches]) -> int | None:
    """The GPU in whose memory the KV cache is; none: host memory.

    Raises:
        UnsupportedError: memory of a device without a copier, or of several devices.
    """
    tensors = (tensor for layer in kv_caches.values() for tensor in views.tensors_of(layer))
    devices = {(tensor.device.type, tensor.device.index) for tensor in tensors}
    if len(devices) == 1:
        kind, index = devices.pop()
        if kind == "cpu":
            return None
        if kind == "cuda":
            ordinal: int = torch.cuda.current_device() if index is None else index
            return ordinal
        devices.add((kind, index))
    raise UnsupportedError(
        "KV Cellar copies KV caches in the memory of the host or of one NVIDIA GPU, not on "
        f"{sorted(map(str, devices))}. Serve without KV Cellar on this platform"
    )


def _isa(gpu: int | None) -> str:
    """How this device's attention kernels pack K and V: opaque, but part of what makes bytes interchangeable."""
    if gpu is not None:
        major, minor = torch.cuda.get_device_capability(gpu)
        return f"cuda/{major}.{minor}"
    return f"{platform.machine()}/{torch.backends.cpu.get_cpu_capability()}"
