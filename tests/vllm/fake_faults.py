"""What a fake engine does wrong on command: with one request, by its header, or with all, by its operator."""

from dataclasses import dataclass
from enum import StrEnum

HEADER = "x-fake-fault"
# Names a request, so that what became of it can be found.
ID_HEADER = "x-fake-id"


class Fault(StrEnum):
    """What becomes of one request."""

    NONE = "none"
    # The connection ends before a byte of the answer, or in the middle of it.
    CLOSE_BEFORE = "close-before"
    CLOSE_MID = "close-mid"
    # Nothing more comes, and the connection stays.
    SILENT_BEFORE = "silent-before"
    SILENT_MID = "silent-mid"
    SLOW = "slow"
    ERROR = "error"
    # As a proxy answers whose engine is gone, or an engine that is overloaded.
    UNAVAILABLE = "unavailable"

    @classmethod
    def of(cls, header: str | None, engine: str) -> "Fault":
        """From `FAULT@ENGINE` or `FAULT@*`."""
        kind, _, where = (header or "").partition("@")
        return cls(kind) if where in {"*", engine} and kind else cls.NONE


@dataclass
class Mode:
    """How an engine is now, whatever is asked.

    Attributes:
        listening: connections are accepted.
        metrics: `ok`, `malformed`, `hang`, `error` or `missing`.
        render: `ok` or `hang`, for everything that only tells token ids.
        fault: what becomes of every completion that has no fault of its own.

    """

    listening: bool = True
    metrics: str = "ok"
    render: str = "ok"
    fault: Fault = Fault.NONE
