"""The connector's part in each worker: hands vLLM's KV tensors and every step's plan to the native copy worker."""

import multiprocessing
import platform

import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.distributed.parallel_state import get_pp_group, get_tp_group
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import KVCacheConfig

from kvcellar import KvcellarError, UnsupportedError, facts, nvrtc, views
from kvcellar._native import Config, CopyWorker, Watch
from kvcellar.metadata import RankOffer, StepMetadata, WorkerTrouble
from kvcellar.stats import KVCellarStats, of_worker

logger = init_logger(f"vllm.{__name__}")

# How long a stopping worker may go on giving checksums to what it offloaded last; vLLM allows 5 s for everything.
HASHING_AT_SHUTDOWN_S = 1.0


class WorkerSide:
    """Worker role of the connector."""

    def __init__(self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, config: Config) -> None:
        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._config = config
        self._native: CopyWorker | None = None
        self._kv_caches: dict[str, torch.Tensor] = {}
        self._gpu: int | None = None
        self._trouble: str | None = None
        self._watches: list[Watch] = []

    def _group_views(self, kv_caches: dict[str, torch.Tensor]) -> list[list[views.LayerView]]:
        """This rank's layers of every group."""
        return views.group_views(self._kv_cache_config, kv_caches)

    def register(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """vLLM allocated its KV cache.

        Args:
            kv_caches: per layer, a view of shape ``[kernel blocks, ...]``. Kept referenced until `shutdown`, because
                the native side holds their addresses.

        Raises:
            UnsupportedError: a layout that cannot be copied, or a device without a copier.
        """
        self._gpu = _gpu_of(kv_caches)
        tensor_rank = get_tp_group().rank_in_group
        rank = get_pp_group().rank_in_group * self._vllm_config.parallel_config.tensor_parallel_size + tensor_rank
        self._kv_caches = dict(kv_caches)
        layers = views.native(self._group_views(kv_caches))
        self._native = CopyWorker(
            self._config, rank, layers, self._gpu, nvrtc.libraries() if self._gpu is not None else []
        )
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

    def offer(self) -> RankOffer | None:
        """What the scheduler's side must know before it can make a pool."""
        if self._native is None:
            return None
        layout = self._kv_cache_config.kv_cache_layout or "unknown"
        native = self._native
        return RankOffer(facts.machine(), layout, _isa(self._gpu), tuple(native.block_bytes), native.near_node)

    def begin_step(self, metadata: StepMetadata) -> None:
        """Before anything of this step is written: attach when told to, start early offloads, wait for fences."""
        if self._native is None:
            return
        if metadata.ticket is not None:
            self._release_with(self._native, metadata.front_end)
            try:
                self._native.attach(metadata.ticket)
            except KvcellarError as error:
                # Loads are reported failed from here on; the scheduler's side takes the tier out of service.
                self._trouble = str(error)
                logger.error("KV Cellar: cannot attach to the host pool: %s", error)
        if metadata.plan:
            self._native.begin_step(metadata.plan, self._stream())

    def start_loads(self) -> None:
        """Blocks are prepared: loads may start, beside the forward pass."""
        if self._native is not None:
            self._native.start_loads(self._stream())

    def finish_step(self) -> None:
        """The forward pass is over: offload what it completed."""
        if self._native is not None:
            self._native.finish_step(self._stream())

    def results(self) -> KVConnectorTransferResults:
        """Loads that ended since the last step; failed ones are among the finished ones too."""
        if self._native is None:
            return KVConnectorTransferResults()
        finished, failed = self._native.take_results()
        return KVConnectorTransferResults(finished_recving=set(finished), failed_recving=set(failed))

    def take_trouble(self) -> WorkerTrouble | None:
        """Why this worker cannot take part, told once."""
        trouble, self._trouble = self._trouble, None
        return None if trouble is None else WorkerTrouble(trouble)

    def take_stats(self) -> KVCellarStats | None:
        """What was copied since the last step. Says in the log what a GPU's copier has to say."""
        if self._native is None:
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
        if self._native is not None:
            self._native.release(HASHING_AT_SHUTDOWN_S)
        self._kv_caches = {}


def _gpu_of(kv_caches: dict[str, torch.Tensor]) -> int | None:
    """The GPU in whose memory the KV cache is; none: host memory.

    Raises:
        UnsupportedError: memory of a device without a copier, or of several devices.
    """
    devices = {(tensor.device.type, tensor.device.index) for tensor in kv_caches.values()}
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
