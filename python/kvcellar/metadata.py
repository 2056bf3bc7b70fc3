"""What travels between the scheduler's and the workers' connectors. Everything here pickles."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from kvcellar.adapters import AdapterReport


@dataclass
class StepMetadata(KVConnectorMetadata):
    """One step's orders.

    Attributes:
        plan: the native engine's orders; empty bytes for none. Only the native worker looks inside.
        ticket: how to attach to the pool (JSON), once, with the first step after the pool was opened.
        front_end: with a ticket: process id of EngineCore's parent, whose death makes orphans of the workers too.
        loads: the loads that ``plan`` orders: our name of each request, and vLLM's id of it.
        failed: vLLM's ids of requests whose load was never ordered: every worker reports them failed.
        retire: the scheduler's side is out of service: finish what is under way and let go of the pool.
        number: of the step, from 1; 0 where nobody counts, which is wherever there are no LoRA adapters.
    """

    plan: bytes
    ticket: str | None = None
    front_end: int | None = None
    loads: Mapping[str, str] = field(default_factory=dict)
    failed: tuple[str, ...] = ()
    retire: bool = False
    number: int = 0


@dataclass
class RankOffer(KVConnectorHandshakeMetadata):
    """What one rank says about its part of a block, before there is a pool.

    Attributes:
        machine: identifies the machine; pools cannot span several.
        layout: vLLM's name of the KV cache layout.
        isa: how this machine's attention kernels pack KV.
        block_bytes: per KV cache group, bytes of one block on this rank.
        near_node: the memory node next to this rank's GPU; None where that is not known.
        attention: the attention backends that vLLM has chosen for this rank's layers.
        shares: per KV cache group, what this rank holds of a block; ranks of one pipeline stage that say the same hold
            the same bytes.
        interleave: so many consecutive tokens lie on one rank, where ranks share the tokens of a block.
    """

    machine: str
    layout: str
    isa: str
    block_bytes: tuple[int, ...]
    near_node: int | None = None
    attention: tuple[str, ...] = ()
    shares: tuple[tuple[int, ...], ...] = ()
    interleave: int = 1


@dataclass
class RankReport:
    """What one rank tells the scheduler's side after a step.

    Attributes:
        offer: this rank's part of a block, once, where there was no handshake.
        trouble: why this rank cannot take part any more, for the log.
        released: this rank has let go of the pool.
        adapters: the LoRA adapters that this rank has loaded, when that changed.
    """

    offer: RankOffer | None = None
    trouble: str | None = None
    released: bool = False
    adapters: AdapterReport | None = None


@dataclass
class WorkerReport(KVConnectorWorkerMetadata):
    """What the ranks have to tell after a step, by (pipeline, tensor) rank."""

    ranks: dict[tuple[int, int], RankReport]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "WorkerReport":
        """Join with the report of another rank."""
        ranks = other.ranks if isinstance(other, WorkerReport) else {}
        return WorkerReport({**self.ranks, **ranks})
