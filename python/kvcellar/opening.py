"""Opening the host pool and the store once every rank has told its part of a block; and what the log says of it."""

import json
import time
from collections.abc import Mapping

from vllm.config import VllmConfig
from vllm.logger import init_logger

from kvcellar import UnsupportedError, facts
from kvcellar._native import DiskReport, PoolReport, TierEngine
from kvcellar.metadata import RankOffer

logger = init_logger(f"vllm.{__name__}")

GIB = 1 << 30


def open_pool(
    engine: TierEngine,
    vllm_config: VllmConfig,
    offers: Mapping[tuple[int, int], RankOffer],
    engines: int,
) -> None:
    """Create or adopt the pool, and open the store.

    Args:
        engine: gets both.
        vllm_config: vLLM's configuration.
        offers: by (pipeline, tensor) rank, what each rank said; every rank is there.
        engines: engines on this machine that share the configured sizes.

    Raises:
        UnsupportedError: ranks on several machines.
        KvcellarError: the pool or the store cannot be had; the message names the setting and the remedy.
    """
    ranks = [offers[key] for key in sorted(offers)]
    machines = {rank.machine for rank in ranks}
    if machines != {facts.machine()}:
        raise UnsupportedError(
            f"The ranks of this engine run on {len(machines)} machines, and a host pool cannot span machines. Run "
            "tensor and pipeline parallel ranks on one machine, or serve without KV Cellar"
        )
    stable = facts.hashes_are_stable(vllm_config)
    known = facts.identify(vllm_config, ranks)
    if known.doubts:
        logger.warning(
            "KV Cellar: what makes KV bytes interchangeable cannot be known, so this start uses nothing of another "
            "one, and no other will use its blocks: %s",
            "; ".join(known.doubts),
        )
    if not stable:
        logger.warning(
            "KV Cellar: block hashes change with every start (%s without PYTHONHASHSEED), so nothing survives a "
            "restart. Set PYTHONHASHSEED, or use sha256.",
            vllm_config.cache_config.prefix_caching_hash_algo,
        )
    native_ranks = [
        {"block_bytes": rank.block_bytes, "replica_of": replica_of}
        for rank, replica_of in zip(ranks, _replicas(offers), strict=True)
    ]
    near = sorted({rank.near_node for rank in ranks if rank.near_node is not None})
    report = engine.open_pool(
        json.dumps(native_ranks),
        known.text,
        stable and not known.doubts,
        PopulateProgress(),
        near,
        engines,
    )
    _log_pool(report, engines)
    if report.disk is not None:
        _log_disk(report.disk)
        if getattr(vllm_config, "shutdown_timeout", None) == 0:
            logger.info(
                "KV Cellar: vLLM kills an engine as soon as it is told to stop, before what is only in memory is "
                "written to the disk. Start vLLM with --shutdown-timeout 10 to let the tiers close."
            )


def _replicas(offers: Mapping[tuple[int, int], RankOffer]) -> list[list[int | None]]:
    """For each rank and group, the first rank that holds the same bytes; None where it is this one."""
    first: dict[tuple[int, int, tuple[int, ...]], int] = {}
    found: list[list[int | None]] = []
    for index, key in enumerate(sorted(offers)):
        twins = [first.setdefault((key[0], group, share), index) for group, share in enumerate(offers[key].shares)]
        found.append([None if twin == index else twin for twin in twins])
    return found


def _log_pool(report: PoolReport, engines: int) -> None:
    logger.info(
        "KV Cellar: dram tier of %.2f GiB (%d blocks, bounded by %s%s; %.0f%% in huge pages) at %s; "
        "%d blocks adopted%s",
        report.bytes / GIB,
        report.slots,
        report.bound,
        f", shared by {engines} engines" if engines > 1 else "",
        100 * report.huge_bytes / report.bytes,
        report.path,
        report.adopted_blocks,
        f"; in use by others: {', '.join(report.taken)}" if report.taken else "",
    )
    for text in report.removed:
        logger.info("KV Cellar: %s", text)
    for text in report.warnings:
        logger.warning("KV Cellar: %s", text)


def _log_disk(disk: DiskReport) -> None:
    if disk.extents_max > 0:
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
    if disk.staging:
        logger.info("KV Cellar: %s", disk.staging)
    for text in disk.removed:
        logger.info("KV Cellar: %s", text)
    for text in disk.warnings:
        logger.warning("KV Cellar: %s", text)
    if disk.damaged:
        logger.warning("KV Cellar: %d extents on disk were damaged and are dropped", disk.damaged)
    if disk.engine_why:
        logger.warning("KV Cellar: the disk is used with %s: %s", disk.engine, disk.engine_why)


class PopulateProgress:
    """Logs the progress of populating the pool, at most every two seconds."""

    def __init__(self) -> None:
        self._next = time.monotonic() + 2.0

    def __call__(self, done: int, total: int) -> None:
        """Log, if it is time to. Both in bytes."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + 2.0
            logger.info("KV Cellar: populating the host pool, %.1f of %.1f GiB", done / GIB, total / GIB)
