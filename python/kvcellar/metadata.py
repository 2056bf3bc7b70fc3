"""What travels between the scheduler's and the workers' connectors. Everything here pickles."""

from dataclasses import dataclass

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)


@dataclass
class StepMetadata(KVConnectorMetadata):
    """One step's orders.

    Attributes:
        plan: the native engine's orders; empty bytes for none. Only the native worker looks inside.
        ticket: how to attach to the pool (JSON), once, with the first step after the pool was opened.
        front_end: with a ticket: process id of EngineCore's parent, whose death makes orphans of the workers too.
    """

    plan: bytes
    ticket: str | None = None
    front_end: int | None = None


@dataclass
class RankOffer(KVConnectorHandshakeMetadata):
    """What one rank says about its part of a block, before there is a pool.

    Attributes:
        machine: identifies the machine; pools cannot span several.
        layout: vLLM's name of the KV cache layout.
        isa: how this machine's attention kernels pack KV.
        block_bytes: per KV cache group, bytes of one block on this rank.
        near_node: the memory node next to this rank's GPU; None where that is not known.
    """

    machine: str
    layout: str
    isa: str
    block_bytes: tuple[int, ...]
    near_node: int | None = None


@dataclass
class WorkerTrouble(KVConnectorWorkerMetadata):
    """A worker cannot take part: the tier has to be taken out of service.

    Attributes:
        problem: what happened, for the log.
    """

    problem: str

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "WorkerTrouble":
        """Join with another rank's trouble; the first is enough to act on."""
        return self
